"""Who runs a task: local processes, MPI ranks or SLURM's tasks."""
