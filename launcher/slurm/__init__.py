"""Run under SLURM: submit a run, supervise it inside its job, get further nodes, report its state."""
