"""What a step's row says of speed, and what the profiler writes. Run: pytest tests/distributed/test_figures.py"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config.run import LogConfig
from pipeline.distributed import device
from pipeline.distributed.process_group import Ranks
from pipeline.records.metrics import StepRow
from pipeline.records.run_folder import METRICS_FILE
from pipeline.training.profiling import FOLDER, TABLE_FILE, TRACE_FILE
from pipeline.training.state import TrainingState
from pipeline.training.step import train_step
from pipeline.training.utilization import flops_per_token, peak_flops
from tests.distributed.conftest import Pools
from tests.distributed.stages import stage_inputs, train_to_the_end, with_parallel


def counted_and_expected(
    ranks: Ranks, tree: dict[str, Any], number: int, folder: Path
) -> dict[str, tuple[float, float]]:
    """Operations per token of a step in linear maps and attention, by torch's count of what ran, and by ours."""
    state = TrainingState.start(stage_inputs(tree, number, folder, ranks), ranks)
    model, length = state.engine.module, state.settings.sequence_length
    model.set_attn_implementation("eager")  # torch does not count what its fused kernel for CPUs does
    with FlopCounterMode(display=False) as counter:
        train_step(state)
    counts = {
        str(operation): count / state.batch_tokens for operation, count in counter.get_flop_counts()["Global"].items()
    }
    linear = flops_per_token(model, 0)
    attention = flops_per_token(model, length) - linear
    state.close()
    # Eager attention computes what causal masking throws away, too.
    return {"linear": (counts["aten.mm"], linear), "attention": (counts["aten.bmm"] / 2, attention)}


@pytest.mark.parametrize("number", [1, 2], ids=["stage1", "stage2"])
def test_the_formula_is_what_torch_counts(pools: Pools, tree: dict[str, Any], tmp_path: Path, number: int) -> None:
    spread = with_parallel(tree, micro_batch_size=4)
    for kind, (counted, expected) in pools[1].run(counted_and_expected, spread, number, tmp_path)[0].items():
        assert expected == pytest.approx(counted, rel=0.06), kind  # routing is not quite uniform


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [("NVIDIA H100 80GB HBM3", torch.bfloat16, 989e12), ("NVIDIA A100-SXM4-40GB", torch.bfloat16, 312e12),
     ("NVIDIA H100 80GB HBM3", torch.float32, None), ("Abacus", torch.bfloat16, None)],
)  # fmt: skip
def test_a_known_gpu_has_a_peak(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, expected: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: name)
    assert device.device_name(torch.device("cuda")) == name
    assert peak_flops(LogConfig(), torch.device("cuda"), dtype) == expected
    assert peak_flops(LogConfig(peak_tflops=2.0), torch.device("cpu"), dtype) == 2e12


def test_rows_say_the_utilization_and_the_profiled_steps_have_a_trace_and_a_table(
    pools: Pools, tree: dict[str, Any], tmp_path: Path
) -> None:
    log = {"tensorboard": False, "peak_tflops": 0.1, "profile_steps": [2, 3]}
    spread = with_parallel({**tree, "log": log}, ranks=2, ep_size=2, micro_batch_size=2)
    pools[2].run(train_to_the_end, spread, 1, tmp_path)
    rows = StepRow.load_rows(tmp_path / METRICS_FILE)
    assert all(row.mfu is not None and 0 < row.mfu < 1 and row.data_seconds < row.seconds for row in rows)
    ratios = [row.mfu / row.tokens_per_second for row in rows if row.mfu is not None]
    assert max(ratios) == pytest.approx(min(ratios))
    names = {event.get("name") for event in json.loads((tmp_path / FOLDER / TRACE_FILE).read_text())["traceEvents"]}
    assert "aten::mm" in names
    assert "Self CPU" in (tmp_path / FOLDER / TABLE_FILE).read_text()
