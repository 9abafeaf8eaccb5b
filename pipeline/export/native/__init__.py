"""Mixtures as architectures that transformers has: no code comes with the folder, where one says exactly the same."""
