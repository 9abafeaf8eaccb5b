"""Ranks: starting, joining, watching and ending them."""
