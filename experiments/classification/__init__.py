"""Image classification: `python -m experiments.classification --help`."""
