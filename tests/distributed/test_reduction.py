"""Gradients are summed over ranks in fp32. Run: pytest tests/distributed/test_reduction.py"""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.conftest import Pools
from tests.distributed.observed import expert_timeouts, optimizer_class, summed_over_ranks
from tests.distributed.stages import train_steps, with_parallel
from tests.helpers.tiny import FFN, HIDDEN

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def tree(tree: dict[str, Any]) -> dict[str, Any]:
    return with_parallel(tree, ranks=2, micro_batch_size=2) | {"deepspeed": "ds_configs/bf16_zero1.json"}


def with_config(tree: dict[str, Any], folder: Path, **bf16: Any) -> dict[str, Any]:
    """The run with other settings of bf16."""
    config = json.loads((ROOT / "ds_configs" / "bf16_zero1.json").read_text())
    config["bf16"] |= bf16
    path = folder / "ds.json"
    path.write_text(json.dumps(config))
    return {**tree, "deepspeed": str(path)}


def test_no_gradient_is_summed_in_bf16(pools: Pools, tree: dict[str, Any], tmp_path: Path) -> None:
    trained = 6 * 3 * HIDDEN * FFN  # of new experts alone
    for summed in pools[2].run(summed_over_ranks, tree, 1, tmp_path):
        assert torch.bfloat16 not in summed
        assert summed[torch.float32] >= trained


@pytest.mark.parametrize("ep_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_adding_gradients_in_fp32_as_they_come_changes_no_bit(
    pools: Pools, tree: dict[str, Any], tmp_path: Path, ep_size: int
) -> None:
    spread = with_parallel(tree, ranks=2, ep_size=ep_size, micro_batch_size=2)
    at_once, later = (
        pools[2].run(train_steps, with_config(spread, tmp_path, immediate_grad_update=at_once), 1, tmp_path / "x", 4)
        for at_once in (True, False)
    )
    for part, expected in zip(at_once, later, strict=True):
        assert part["rows"] == expected["rows"]
        assert part["weights"].keys() == expected["weights"].keys()
        assert all(torch.equal(part["weights"][name], tensor) for name, tensor in expected["weights"].items())


def test_the_experts_groups_wait_as_long_as_the_run_s(pools: Pools, tree: dict[str, Any], tmp_path: Path) -> None:
    spread = with_parallel(tree, ranks=2, ep_size=2, micro_batch_size=2)
    for found in pools[2].run(expert_timeouts, spread, 1, tmp_path):
        assert found == [timedelta(minutes=31)] * 3  # of parallel.timeout_minutes, and the watchdog's start


@pytest.mark.parametrize(
    ("precision", "expected"),
    [("bf16", ("BF16_Optimizer", False)), ("bf16_offload", ("DeepSpeedZeroOptimizer", True))],
)
def test_offload_is_deepspeeds(
    pools: Pools, tree: dict[str, Any], tmp_path: Path, precision: str, expected: tuple[str, bool]
) -> None:
    offloading = {**with_parallel(tree), "deepspeed": f"ds_configs/{precision}_zero1.json"}
    assert pools[1].run(optimizer_class, offloading, tmp_path) == [expected]
