"""The same order as a PyTorch data set for other people's training loops."""
