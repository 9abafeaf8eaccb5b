"""One stage of training, on every rank."""
