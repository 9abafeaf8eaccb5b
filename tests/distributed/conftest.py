"""Pools of 1, 2 and 4 ranks, shared by all distributed tests: starting one takes seconds."""

from collections.abc import Iterator

import pytest

from tests.helpers.rank_pool import RankPool


class Pools:
    """Pools by number of ranks, started when first asked for; one that a failure ended is replaced."""

    def __init__(self) -> None:
        self._pools: dict[int, RankPool] = {}

    def __getitem__(self, world_size: int) -> RankPool:
        pool = self._pools.get(world_size)
        if pool is None or not pool.alive:
            pool = self._pools[world_size] = RankPool(world_size)
        return pool

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    """pools[2].run(function, …) runs a function on two ranks."""
    pools = Pools()
    yield pools
    pools.close()
