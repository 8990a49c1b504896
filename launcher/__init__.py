"""Start the ranks of a run and keep them going: on one machine, over many nodes, inside SLURM."""
