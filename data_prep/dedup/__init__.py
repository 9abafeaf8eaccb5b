"""Copies: of each other, and of held-out text."""
