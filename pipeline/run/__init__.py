"""A run's steps, its folder and its lock."""
