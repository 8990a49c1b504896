"""Training on this machine: N ranks, restarted together."""
