"""A run on a real SLURM under many failures, and how long each of them stops it."""
