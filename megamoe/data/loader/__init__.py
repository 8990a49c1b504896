"""The training loader: a rank's part of each optimizer step, made by worker processes."""
