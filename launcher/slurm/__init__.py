"""SLURM: what is submitted, what runs inside the job, and what can be told of it."""
