"""Stages of a tiny run on one rank with nccl, beside the same on a CPU. Run: pytest tests/gpu/test_training.py"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.estimate.device import Device
from pipeline.estimate.report import Estimate
from tests.distributed.conftest import Pools
from tests.distributed.stages import train_steps, train_to_the_end
from tests.gpu.ranks import (
    experts_both_ways,
    grouped_calls,
    losses_one_by_one,
    memory_and_figures,
    own_and_waited,
    waits_of_layers,
)
from tests.helpers.tiny import parse_run, prepared_run, run_tree, save_model, write_run

if not torch.cuda.is_available():
    pytest.skip("torch finds no GPU here", allow_module_level=True)

ROOT = Path(__file__).parents[2]
STEPS = 4


def losses(result: dict[str, Any]) -> list[dict[str, float]]:
    """Of each step."""
    return [row["loss"] for row in result["rows"]]


@pytest.mark.parametrize("number", [1, 2])
def test_a_stage_takes_the_steps_that_it_takes_on_a_cpu(
    gpu: Pools,
    cpu: Pools,
    tree: dict[str, Any],
    tmp_path: Path,
    number: int,
) -> None:
    (here,) = gpu[1].run(train_steps, tree, number, tmp_path / "gpu", STEPS)
    (there,) = cpu[1].run(train_steps, tree, number, tmp_path / "cpu", STEPS)
    assert here["frozen_unchanged"] and here["frozen"] == there["frozen"]
    for ours, theirs in zip(losses(here), losses(there), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    for name, gradient in there["gradients"].items():
        torch.testing.assert_close(here["gradients"][name].cpu(), gradient, rtol=1e-3, atol=1e-5)
    for name, weight in there["weights"].items():
        torch.testing.assert_close(here["weights"][name].cpu(), weight, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("config", ["bf16_zero2", "bf16_offload_zero1"])
def test_zero_2_and_offloading_take_the_steps_of_zero_1(
    gpu: Pools,
    tree: dict[str, Any],
    tmp_path: Path,
    config: str,
) -> None:
    found = [
        gpu[1].run(train_steps, {**tree, "deepspeed": f"ds_configs/{name}.json"}, 1, tmp_path / name, STEPS)[0]
        for name in ("bf16_zero1", config)
    ]
    for ours, theirs in zip(losses(found[1]), losses(found[0]), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3)


@pytest.mark.parametrize("number", [1, 2])
def test_with_deterministic_a_resumed_stage_ends_bit_by_bit_as_one_that_went_through(
    gpu: Pools,
    tree: dict[str, Any],
    tmp_path: Path,
    number: int,
) -> None:
    exact = {**tree, "deepspeed": "ds_configs/bf16_zero1.json", "parallel": {"deterministic": True}}
    (whole,) = gpu[1].run(deterministic_steps, exact, number, tmp_path / "whole", STEPS)
    gpu[1].run(deterministic_steps, exact, number, tmp_path / "parts", 2, 2)
    (resumed,) = gpu[1].run(deterministic_steps, exact, number, tmp_path / "parts", STEPS, None, True)
    assert losses(resumed) == losses(whole)[2:]
    for name, weight in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], weight), name


def deterministic_steps(ranks: Any, *arguments: Any) -> dict[str, Any]:
    """As the product's loop asks torch to."""
    torch.use_deterministic_algorithms(True)
    try:
        return train_steps(ranks, *arguments)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("number", [1, 2])
def test_a_layers_forward_waits_for_the_gpu_once_and_its_backward_never(
    gpu: Pools,
    tree: dict[str, Any],
    tmp_path: Path,
    number: int,
) -> None:
    (found,) = gpu[1].run(waits_of_layers, tree, number, tmp_path)
    assert found == [(1, 0)] * 3


@pytest.mark.parametrize("counts", [[5, 0, 333, 64], [1, 0, 0], [700, 801]], ids=["uneven", "nearly none", "many"])
def test_experts_in_one_kernel_give_output_and_gradients_of_one_after_another(gpu: Pools, counts: list[int]) -> None:
    (found,) = gpu[1].run(experts_both_ways, 256, 384, counts)
    assert len(found) == 2 + 2 * len(counts)
    for ours, exact in found:
        assert float((ours - exact).norm()) <= 1e-2 * float(exact.norm())


@pytest.mark.parametrize("number", [1, 2])
def test_in_bf16_one_kernel_computes_a_layers_experts_and_losses_stay_the_same(
    gpu: Pools, tree: dict[str, Any], tmp_path: Path, number: int
) -> None:
    """Of the layers, with 2, 1 and 3 new experts, two have several; the batch of 8 is one micro-step."""
    bf16 = {**tree, "deepspeed": "ds_configs/bf16_zero1.json", "parallel": {"micro_batch_size": 8}}
    ((calls, found),) = gpu[1].run(grouped_calls, bf16, number, tmp_path / "one kernel")
    assert calls == 2 * 2
    (expected,) = gpu[1].run(losses_one_by_one, bf16, number, tmp_path / "one by one")
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=5e-3)


def test_a_ranks_own_time_is_without_its_waits_and_nothing_waits_to_measure_it(gpu: Pools) -> None:
    (found,) = gpu[1].run(own_and_waited)
    assert found["own"] == pytest.approx(2 * found["one"], rel=0.1)
    assert found["all"] == pytest.approx(4 * found["one"], rel=0.1)
    assert found["launched"] < 0.5 * found["one"]


def test_profile_steps_writes_a_table_with_the_gpus_kernels(
    gpu: Pools,
    tree: dict[str, Any],
    tmp_path: Path,
) -> None:
    gpu[1].run(train_to_the_end, {**tree, "log": {"tensorboard": False, "profile_steps": [2, 3]}}, 1, tmp_path)
    (table,) = tmp_path.rglob("profile/table.txt")
    assert "CUDA time total" in table.read_text()
    trace = json.loads((table.parent / "trace.json").read_text())
    assert any(event.get("cat") == "kernel" for event in trace["traceEvents"])


@pytest.mark.parametrize("checkpointing", [False, True], ids=["activations kept", "activations computed again"])
def test_the_estimate_is_within_10_percent_of_what_torch_allocates(
    gpu: Pools, tmp_path: Path, checkpointing: bool
) -> None:
    """A model large enough that its blocks are no rounding error of the allocator's."""
    save_model(
        tmp_path / "model", hidden_size=1024, intermediate_size=2816, num_attention_heads=16, num_key_value_heads=8,
        head_dim=64, num_layers=6,
    )  # fmt: skip
    stage = {
        "tokens": 65536, "sequence_length": 512, "global_batch_size": 16, "lr": 1e-4,
        "activation_checkpointing": checkpointing,
    }  # fmt: skip
    experts = {"allocation": "explicit", "counts": [3, 2, 2, 4, 1, 3], "classifier_layers": [0]}
    changes = {"deepspeed": "ds_configs/bf16_zero1.json", "experts": experts, "stage1": stage, "stage2": stage}
    prepared_run(tmp_path, distinct_experts=False, **changes)
    run = {**run_tree(tmp_path, **changes), "parallel": {"micro_batch_size": 16}}
    (found,) = gpu[1].run(memory_and_figures, run, tmp_path / "stage", 3)
    estimate = Estimate(parse_run(run, "x"), 1, Device.named("80GB"), ep_size=1)
    memory = estimate.memory(estimate.stages[0])
    needed = memory["peak"] - memory["process"] - memory["allocator"]
    assert found["peak"] == pytest.approx(needed, rel=0.1)


def test_the_command_line_runs_all_steps_on_the_gpu_in_bf16(tmp_path: Path) -> None:
    path = write_run(tmp_path, deepspeed="ds_configs/bf16_zero1.json", parallel={"ranks": 1})
    environment = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    command = [sys.executable, "-m", "pipeline", "run", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"stage 1: {torch.cuda.get_device_name()}, nccl, bfloat16" in done.stdout
    assert (tmp_path / "runs" / "tiny" / "evaluation.json").is_file()
