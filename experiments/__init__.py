"""The paper's experiments, each a command: `python -m experiments.NAME --help`."""

import signal as _signal
import sys as _sys

if _sys.argv[0] == "-m":
    # A command is about to be imported, which takes seconds: Ctrl-C ends it without a traceback.
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
