"""Face recognition: `python -m experiments.face --help`."""
