"""Weights are read and verified once, however many ranks there are. Run: pytest tests/distributed/test_reading.py"""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoint.tensors import main_file
from tests.distributed.conftest import Pools
from tests.distributed.stages import files_read, with_parallel

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
    assert len(hashed) >= NEW + 1 and max(hashed.values()) <= 2
