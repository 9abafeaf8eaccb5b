"""Many runs of one base: each with its overrides and seed, one after the other or as SLURM's jobs."""
