"""What every experiment shares: data, the training loop, checkpoints, errors."""
