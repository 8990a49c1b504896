"""Train on this machine: N ranks, restarted together when one fails."""
