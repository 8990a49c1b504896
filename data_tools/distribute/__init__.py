"""Run one function over many shards: in local processes, on a Dask cluster, or in SLURM jobs.

Everything goes through ``jobs.map_jobs``. It uses ``process_pool`` on this machine and ``dask_cluster`` on many, whose
workers ``slurm_workers`` can start as SLURM jobs.
"""
