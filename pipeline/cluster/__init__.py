"""A run on a cluster: which rank a process is, jobs submitted to SLURM, their state, and what the nodes can do."""
