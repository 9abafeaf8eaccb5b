"""What a run will take, before it runs: parameters, memory per rank, network, checkpoints, time."""
