"""The paper's experiments, each a command: `python -m experiments.NAME --help`."""

import multiprocessing as _multiprocessing
import signal as _signal
import sys as _sys

if _sys.argv[0] == "-m":
    # A command is about to be imported, which takes seconds: Ctrl-C ends it without a traceback.
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
elif _multiprocessing.parent_process():
    # A process that reads images for a run. Here, since its other imports take seconds too.
    from experiments.runtime.preemption import serve_the_parent as _serve_the_parent

    _serve_the_parent()
