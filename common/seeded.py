"""Choices at random that depend on a seed and on names alone: the same in every process, on every machine."""

import hashlib


def seeded_hash(seed: int, *names: object) -> int:
    """A whole number from 0 to 2**64 - 1, as good as drawn at random for each seed and names."""
    text = "\0".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def seeded_order(seed: int, count: int, *names: object) -> list[int]:
    """The numbers below ``count`` in a random order."""
    return sorted(range(count), key=lambda number: seeded_hash(seed, *names, number))
