"""Weights are read and verified once, however many ranks there are. Run: pytest tests/distributed/test_reading.py"""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoint.tensors import main_file
from tests.distributed.conftest import Pools
from tests.distributed.observed import files_read
from tests.distributed.stages import with_parallel
from tests.helpers.tiny import prepared_run, run_tree

NEW = 6  # new experts, each a file
READS = {1: {0: 6}, 2: {0: 4, 1: 2}}  # files by ep_size and rank; a layer's only expert is on both ranks of a group


@pytest.mark.parametrize(("ranks", "ep_size"), [(4, 1), (4, 2), (2, 2)])
@pytest.mark.parametrize("number", [1, 2])
def test_every_weight_is_read_by_one_rank_and_verified_by_one_more(
    pools: Pools, tree: dict[str, Any], tmp_path: Path, ranks: int, ep_size: int, number: int
) -> None:
    alone = pools[1].run(files_read, tree, number, tmp_path / "alone")[0]
    found = pools[ranks].run(files_read, with_parallel(tree, ranks=ranks, ep_size=ep_size), number, tmp_path / "many")
    loaded = Counter(name for one in found for name in one["loaded"])
    assert loaded.pop(main_file()) == 1
    assert len(loaded) == NEW and set(loaded.values()) == {1}
    for rank, one in enumerate(found):
        assert main_file() not in one["loaded"] or rank == 0
        assert set(one["loaded"]) <= set(one["hashed"]), "a rank verifies what it loads"
        experts = [name for name in one["loaded"] if name != main_file()]
        assert len(experts) == READS[ep_size].get(rank, 0)
        for name, tensor in one["weights"].items():
            assert torch.equal(tensor, alone["weights"][name]), name
    hashed = Counter(name for one in found for name in one["hashed"])
    assert len(hashed) >= NEW + 1
    assert max(count for name, count in hashed.items() if name != main_file()) <= 2


@pytest.mark.parametrize(("ranks", "ep_size", "first"), [(4, 1, 1), (4, 2, 2)])
def test_experts_without_files_are_copied_by_the_first_ranks_that_hold_them(
    pools: Pools, tmp_path: Path, ranks: int, ep_size: int, first: int
) -> None:
    prepared_run(tmp_path, distinct_experts=False)
    spread = with_parallel(run_tree(tmp_path), ranks=ranks, ep_size=ep_size)
    found = pools[ranks].run(files_read, spread, 1, tmp_path / "stage")
    for rank, one in enumerate(found):
        assert set(one["loaded"]) == ({main_file()} if rank < first else set())
        assert set(one["loaded"]) <= set(one["hashed"]), "a rank verifies what it loads"
    together = {name: tensor for one in found for name, tensor in one["weights"].items()}
    for moe_layer, (layer, new) in enumerate({0: 2, 1: 1, 3: 3}.items()):
        mlp = together[f"model.layers.{layer}.mlp.base_mlp.down_proj.weight"]
        for number in range(new):
            assert torch.equal(together[f"expert {(moe_layer, number)} down_proj"], mlp)
