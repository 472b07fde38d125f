"""The paper's claim on real images: `python -m experiments.ablation --help`."""
