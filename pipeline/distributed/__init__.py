"""Ranks: starting, joining, dividing, watching and ending them."""
