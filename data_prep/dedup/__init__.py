"""Documents that copy each other, or held-out text."""
