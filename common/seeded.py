"""Random choices that depend only on a seed and on names: the same in every process, on every machine."""

import hashlib


def seeded_hash(seed: int, *names: object) -> int:
    """An integer from 0 to 2**64 - 1, uniformly distributed over seeds and names."""
    text = "\0".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def seeded_order(seed: int, count: int, *names: object) -> list[int]:
    """The numbers below ``count`` in a random order."""
    return sorted(range(count), key=lambda number: seeded_hash(seed, *names, number))
