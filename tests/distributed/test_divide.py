"""``parallel.ep_size: auto`` is the smallest that fits, on all ranks. Run: pytest tests/distributed/test_divide.py"""

import io
import os
from contextlib import redirect_stdout
from typing import Any
from unittest.mock import patch

import pytest
import torch

from pipeline.distributed.process_group import Ranks
from pipeline.estimate.device import Device
from pipeline.estimate.divide import divide
from pipeline.estimate.report import USABLE, Estimate
from tests.distributed.conftest import Pools
from tests.distributed.stages import with_parallel
from tests.helpers.tiny import parse_run, prepared_run, run_tree, save_model


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model whose experts take more memory than what it keeps for the backward."""
    folder = tmp_path_factory.mktemp("divide")
    save_model(folder / "model", hidden_size=128, intermediate_size=1024)
    prepared_run(folder)
    return run_tree(folder)


def ep_size_and_line(ranks: Ranks, tree: dict[str, Any], share: float) -> tuple[int, str]:
    """On devices that hold all experts and more (1), some of them (0.5), or too few (0)."""
    run = parse_run(tree, "x")
    two = {"LOCAL_WORLD_SIZE": "2"}  # as a launcher says
    with patch.dict(os.environ, two), patch.object(Device, "process", 0):  # beside which a tiny model is nothing
        estimate = Estimate(run, ranks.world_size, Device())
        least, most = estimate.peak(ranks.world_size), estimate.peak(1)
        capacity = {0.0: 0.9 * least, 0.5: (least + most) / 2, 1.0: 1.01 * most}[share] / USABLE
        device = Device("cpu", capacity if ranks.is_first else 1.0)  # what others have does not count
        with patch.object(Device, "of_this_rank", lambda _: device), redirect_stdout(io.StringIO()) as printed:
            return divide(run, ranks).ep_size, printed.getvalue()


@pytest.mark.parametrize(("share", "ep_size"), [(1.0, 1), (0.5, 2), (0.0, 2)])
def test_auto_is_the_smallest_that_fits_the_first_ranks_device(
    pools: Pools, tree: dict[str, Any], share: float, ep_size: int
) -> None:
    found = pools[2].run(ep_size_and_line, with_parallel(tree, ranks=2, ep_size="auto"), share)
    assert [size for size, _ in found] == [ep_size, ep_size]
    assert found[1][1] == ""
    assert found[0][1].startswith("warning: parallel.ep_size: does not fit 2 ranks") == (share == 0.0)


def test_one_rank_needs_no_estimate(tree: dict[str, Any]) -> None:
    with patch("pipeline.estimate.divide.Estimate", side_effect=AssertionError):
        assert divide(parse_run(with_parallel(tree), "x"), Ranks(0, 1, torch.device("cpu"))).ep_size == 1
