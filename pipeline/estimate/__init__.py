"""What a run will take, before anything runs: parameters, memory a rank, network, checkpoints, time."""
