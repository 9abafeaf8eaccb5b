"""Ranks that do not divide the global batch compute the same. Run: pytest tests/distributed/test_undivided.py"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.conftest import Pools
from tests.distributed.stages import train_steps, with_parallel

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.mark.parametrize("number", [1, 2], ids=["stage1", "stage2"])
def test_three_ranks_and_a_batch_of_eight(pools: Pools, tree: dict[str, Any], tmp_path: Path, number: int) -> None:
    """Three micro-steps of three samples, the last of two and an empty one: the same samples as on one rank."""
    one, three = train_on_one_and_three(pools, tree, number, tmp_path)
    for ours, expected in zip(three[0]["rows"], one["rows"], strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-5, abs=1e-6)
        assert ours["samples"] == expected["samples"]
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        assert ours["expert_0_share"] == pytest.approx(expected["expert_0_share"])
        assert ours["load_imbalance"] == pytest.approx(expected["load_imbalance"])
    gradients = {name: tensor for part in three for name, tensor in part["gradients"].items()}
    assert gradients.keys() == one["gradients"].keys()
    for name, tensor in one["gradients"].items():
        torch.testing.assert_close(gradients[name], tensor, **CLOSE)


def test_local_balance_statistics_on_three_ranks_weigh_samples_alike(
    pools: Pools, tree: dict[str, Any], tmp_path: Path
) -> None:
    """The loss of uniform routing is 1 whatever the split: an empty sample must not pull it down."""
    tree = {**tree, "stage1": {**tree["stage1"], "balance_statistics": "local"}}
    one, three = train_on_one_and_three(pools, tree, 1, tmp_path)
    assert three[0]["rows"][0]["loss"]["next_token"] == pytest.approx(one["rows"][0]["loss"]["next_token"], rel=1e-5)
    assert three[0]["rows"][0]["loss"]["balance"] == pytest.approx(one["rows"][0]["loss"]["balance"], rel=0.1)


def train_on_one_and_three(
    pools: Pools, tree: dict[str, Any], number: int, folder: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Three steps on one rank in micro-batches of three, and on three ranks in micro-batches of one."""
    one = pools[1].run(train_steps, with_parallel(tree, micro_batch_size=3), number, folder / "one", 3)[0]
    spread = with_parallel(tree, ranks=3, ep_size=3, micro_batch_size=1)
    return one, pools[3].run(train_steps, spread, number, folder / "three", 3)


def test_the_next_token_loss_of_the_batch_is_that_of_ranks_that_divide_it(
    pools: Pools, tree: dict[str, Any], tmp_path: Path
) -> None:
    """Before any weight has changed, whatever the micro-batches: nothing is dropped, nothing counts twice."""
    first = [
        pools[ranks].run(
            train_steps, with_parallel(tree, ranks=ranks, micro_batch_size=micro), 2, tmp_path / f"{ranks}-{micro}", 1
        )[0]["rows"][0]["loss"]
        for ranks, micro in ((1, 8), (2, 4), (3, 3), (3, 2), (3, 1), (1, 5))
    ]
    for loss in first[1:]:
        assert loss == pytest.approx(first[0], rel=1e-5)
