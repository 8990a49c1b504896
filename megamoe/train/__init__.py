"""The training loop: data, one step, metrics, checkpoints."""
