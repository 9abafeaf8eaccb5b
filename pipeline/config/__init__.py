"""Every key of a run, checked once."""
