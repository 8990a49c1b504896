"""The same function over many shards: in processes, on a Dask cluster, as SLURM jobs."""
