"""The paper's experiments, each a command: `python -m experiments.NAME --help`."""
