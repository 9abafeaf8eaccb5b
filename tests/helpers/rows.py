"""Rows of metrics."""

# Figures of a step that differ each time it is done: times, what follows from them, and memory.
TIMING = ("seconds", "tokens_per_second", "memory_gb", "data_seconds", "mfu", "slowest_rank")
