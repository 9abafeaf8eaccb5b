"""The rank that others wait for is named. Run: pytest tests/distributed/test_slowest_rank.py"""

import time
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import pytest
import torch

from pipeline.distributed.own_time import OwnTime
from pipeline.distributed.process_group import Ranks
from pipeline.model.backbone import decoder_layers
from pipeline.records.metrics import SlowestRank, StepRow
from pipeline.records.run_folder import METRICS_FILE
from pipeline.training.metrics import MetricsLog
from pipeline.training.slowest_rank import find_slowest
from pipeline.training.state import TrainingState
from pipeline.training.step import train_step
from tests.distributed.conftest import Pools
from tests.distributed.stages import lines_of_progress, stage_inputs, with_parallel

SLOW = 0.3  # seconds that a rank sleeps in each step, many times what a tiny model takes
STEPS = 5
MOST = 3  # as other processes on this machine may delay any rank in any step
CPU = torch.device("cpu")


def slowest_in_each_step(
    ranks: Ranks, tree: dict[str, Any], number: int, folder: Path, seconds: list[float], where: str = "forward"
) -> list[SlowestRank | None]:
    """What this rank is told in each of some steps, in which each rank sleeps in the model's last layer."""
    state = TrainingState.start(stage_inputs(tree, number, folder, ranks), ranks)
    train_step(state)  # the first one generates kernels
    _sleep_in_last_layer(state, seconds[ranks.rank] / state.shape.accumulation, where)
    state.hosts = ["node1", "node2"]
    found = [train_step(state).slowest_rank for _ in range(STEPS)]
    state.close()
    return found


def _sleep_in_last_layer(state: TrainingState, seconds: float, where: str) -> None:
    layer = decoder_layers(state.engine.module)[-1]
    if where == "forward":
        layer.register_forward_pre_hook(lambda *_: time.sleep(seconds))
    else:
        layer.register_full_backward_pre_hook(lambda *_: time.sleep(seconds))


def names(found: list[SlowestRank | None]) -> list[str | None]:
    return [slowest and slowest.name for slowest in found]


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("ep_size", [1, 2])
@pytest.mark.parametrize("number", [1, 2], ids=["stage1", "stage2"])
def test_a_rank_that_works_longer_is_named_in_most_steps_and_on_all_ranks_alike(
    pools: Pools, tree: dict[str, Any], tmp_path: Path, number: int, ep_size: int, where: str
) -> None:
    spread = with_parallel(tree, ranks=2, ep_size=ep_size, micro_batch_size=2)
    first, second = pools[2].run(slowest_in_each_step, spread, number, tmp_path, [0.0, SLOW], where)
    assert names(first).count("node2:1") >= MOST
    assert first == second


@pytest.mark.parametrize("ep_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_no_rank_is_named_in_most_steps_of_two_that_work_as_long(
    pools: Pools, tree: dict[str, Any], tmp_path: Path, ep_size: int
) -> None:
    spread = with_parallel(tree, ranks=2, ep_size=ep_size, micro_batch_size=2)
    found, _ = pools[2].run(slowest_in_each_step, spread, 1, tmp_path, [3 * SLOW, 3 * SLOW])
    assert names(found).count(None) >= MOST


def test_with_zero_2_the_forward_is_compared(pools: Pools, tree: dict[str, Any], tmp_path: Path) -> None:
    spread = {**with_parallel(tree, ranks=2, ep_size=1, micro_batch_size=2), "deepspeed": "ds_configs/bf16_zero2.json"}
    found, _ = pools[2].run(slowest_in_each_step, spread, 1, tmp_path, [SLOW, 0.0])
    assert names(found).count("node1:0") >= MOST


def lines_with_a_slow_rank(ranks: Ranks, tree: dict[str, Any], folder: Path) -> list[str]:
    """What the progress of a whole stage says if rank 1 sleeps."""
    start = TrainingState.start

    def slow(*arguments: Any) -> TrainingState:
        state = start(*arguments)
        _sleep_in_last_layer(state, SLOW if ranks.rank else 0.0, "forward")
        return state

    with patch.object(TrainingState, "start", slow):
        return lines_of_progress(ranks, tree, 1, folder)


def test_progress_and_metrics_name_it(pools: Pools, tree: dict[str, Any], tmp_path: Path) -> None:
    spread = with_parallel(tree, ranks=2, ep_size=2, micro_batch_size=4)
    lines = pools[2].run(lines_with_a_slow_rank, spread, tmp_path)[0]
    rows = StepRow.load_rows(tmp_path / METRICS_FILE)
    assert sum(row.slowest_rank is not None and row.slowest_rank.rank == 1 for row in rows) > len(rows) / 2
    last = rows[-1].slowest_rank
    said = f" slowest {last.name} {last.percent:+.0f} %" if last else ""
    assert lines[-1].endswith(said) and ("slowest" in lines[-1]) == bool(said)


@pytest.mark.parametrize(
    ("slowest", "percent"), [(None, 0.0), (SlowestRank(rank=1, host="node2", percent=18.0), 18.0)]
)
def test_monitors_have_a_curve_of_it(tmp_path: Path, slowest: SlowestRank | None, percent: float) -> None:
    monitor = MagicMock(enabled=True)
    log = MetricsLog(tmp_path, monitor, [0], writes=True, world_size=2)
    row = StepRow(
        step=1, samples=8, tokens=256, loss={}, expert_0_share={}, load_imbalance=[1.0], lr=1e-4, grad_norm=1.0,
        skipped=None, tokens_per_second=1.0, memory_gb=1.0, seconds=1.0, slowest_rank=slowest,
    )  # fmt: skip
    log.step(row)
    assert ("train/slowest_rank_percent", percent, 8) in monitor.write_events.call_args.args[0]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ([1.0], None),
        ([1.0, 1.09], None),
        ([1.0, 1.2], ("b:1", 20)),
        ([1.3, 1.0, 1.0, 1.1], ("a:0", 30)),
        ([2.0, 2.0, 1.0, 2.0], None),
        ([0.0, 0.0], None),
    ],
)
def test_the_slowest_is_compared_with_the_median_of_the_others(
    seconds: list[float], expected: tuple[str, int] | None
) -> None:
    found = find_slowest(seconds, list("abcd")[: len(seconds)])
    assert (found and (found.name, round(found.percent))) == expected


def test_only_work_before_the_last_mark_counts_and_waits_do_not() -> None:
    clock, now = OwnTime(), iter([0.0, 1.0, 5.0, 7.0, 8.0, 100.0, 103.0])
    with patch("time.perf_counter", lambda: next(now)):
        clock.mark()  # outside of steps nothing is measured
        clock.begin(CPU)
        with clock.waiting():  # from 1 to 5
            pass
        clock.mark()  # at 7
        with clock.waiting():  # from 8 on
            pass
        clock.begin(CPU)
    assert clock.take() == 1.0 + 2.0
    assert clock.take() == 0.0
