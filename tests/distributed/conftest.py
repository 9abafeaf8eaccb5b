"""Pools of 1, 2 and 4 ranks, shared by all distributed tests: starting one takes seconds."""

from collections.abc import Iterator
from typing import Any

import pytest

from pipeline.records.run_folder import RunFolder
from pipeline.run.context import RunContext
from tests.helpers.rank_pool import RankPool
from tests.helpers.tiny import do_steps, parse_run, prepared_run, run_tree


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


@pytest.fixture(scope="session")
def tree_of_groups(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny run of 4, 1, 0 and 3 new experts: with ep_size 4, groups of 4, 1 and 2 ranks."""
    folder = tmp_path_factory.mktemp("groups")
    changes = {"experts": {"allocation": "explicit", "counts": [5, 2, 1, 4], "classifier_layers": [0, 3]}}
    prepared_run(folder, **changes)
    return run_tree(folder, **changes)


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The settings of a tiny run that is done up to upcycling; tests change copies, and nothing in its folders."""
    folder = tmp_path_factory.mktemp("prepared")
    prepared_run(folder)
    return run_tree(folder)


@pytest.fixture(scope="session")
def trained(pools: Pools, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The settings of a tiny run that is done; tests change nothing in its folders but what they add."""
    from tests.distributed.rounds import run

    tree = run_tree(tmp_path_factory.mktemp("trained"), parallel={"micro_batch_size": 1})
    run(pools, tree, 1)
    return tree


@pytest.fixture(scope="session")
def second_round(pools: Pools, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The settings of a second round that is done up to upcycling."""
    from tests.distributed.rounds import run, tree_of

    folder = tmp_path_factory.mktemp("rounds")
    run(pools, tree_of(folder, 0, ranks=1), 1)
    tree = tree_of(folder, 1)
    context = RunContext(parse_run(tree, "x"))
    RunFolder.create(context.run)
    do_steps(context, "tokenize", "similarity", "allocate", "upcycle")
    return tree
