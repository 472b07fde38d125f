"""Image folders to ArrayRecord files: `python -m experiments.convert --help`."""
