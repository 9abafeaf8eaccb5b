"""What `estimate` says is what ranks hold. Run: pytest tests/distributed/test_estimate.py"""

import json
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from common.errors import UserError
from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.distributed.process_group import Ranks, forget_earlier_stages
from pipeline.estimate.device import Device
from pipeline.estimate.memory import OFFLOADED, checkpoint_bytes, most_experts, network_per_token
from pipeline.estimate.report import Estimate
from pipeline.method.stages import find_stage
from pipeline.training.state import TrainingState
from pipeline.training.step import train_step
from tests.distributed.conftest import Pools
from tests.distributed.observed import held_bytes
from tests.distributed.stages import stage_inputs, with_parallel
from tests.helpers.tiny import parse_run, prepared_run, run_tree, save_model

ROOT = Path(__file__).parent.parent.parent
GPU = Device.named("80GB")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model large enough that file headers don't matter."""
    folder = tmp_path_factory.mktemp("estimate")
    save_model(folder / "model", hidden_size=128, intermediate_size=1024)
    changes = {"deepspeed": "ds_configs/bf16_zero1.json"}
    prepared_run(folder, **changes)
    return run_tree(folder, **changes)


@pytest.mark.parametrize("number", [1, 2], ids=["stage1", "stage2"])
@pytest.mark.parametrize(("ranks", "ep_size"), [(1, 1), (2, 1), (2, 2)])
def test_weights_gradients_masters_moments_and_checkpoint_are_what_the_fullest_rank_holds(
    pools: Pools, tree: dict[str, Any], tmp_path: Path, number: int, ranks: int, ep_size: int
) -> None:
    tree = with_parallel(tree, ranks=ranks, ep_size=ep_size, micro_batch_size=2)
    held = pools[ranks].run(held_bytes, tree, number, tmp_path)
    estimate = Estimate(parse_run(tree, "x"), ranks, Device(), ep_size=ep_size)
    stage = find_stage(estimate.run, number)
    memory = estimate.memory(stage)
    for kind in ("weights", "master weights", "moments"):
        assert memory[kind] == pytest.approx(max(rank[kind] for rank in held), rel=0.02), kind
    if number == 1:  # fp32 sums, to which bf16 gradients are added as they come
        assert memory["gradients"] == pytest.approx(max(rank["gradients"] for rank in held), rel=0.02)
        size = checkpoint_bytes(estimate.sizes, estimate.plan, estimate.dims, estimate.dtype, stage)
        assert held[0]["checkpoint"] == pytest.approx(size, rel=0.02)


def held_by_zero(ranks: Ranks, tree: dict[str, Any], folder: Path) -> dict[str, float]:
    """What this rank's optimizer holds, by kind, in stage 1; of gradients the most while a step is taken."""
    forget_earlier_stages(ranks.device)
    state = TrainingState.start(stage_inputs(tree, 1, folder, ranks), ranks)
    train_step(state)
    optimizer, inner = state.engine.optimizer, state.engine.basic_optimizer
    trained = [parameter for parameter in state.engine.module.parameters() if parameter.requires_grad]
    largest: Counter[str] = Counter()
    known_buckets: dict[int, int] = {}

    def look(*_: Any) -> None:
        buckets = storages(bucket.buffer for bucket in optimizer.ipg_buckets.values())
        known_buckets.update(buckets)  # gradients lie in one when DeepSpeed itself has let it go
        sums = storages([[(p.grad, getattr(p, "grad_accum", None)) for p in trained], optimizer.averaged_gradients])
        of_sums = {pointer: size for pointer, size in sums.items() if known_buckets.get(pointer) != size}
        found = {"buckets": sum(buckets.values()), "sums": sum(of_sums.values())}
        for kind, size in found.items():
            largest[kind] = max(largest[kind], size)

    all_reduce = torch.distributed.all_reduce

    def looking(*arguments: Any, **options: Any) -> Any:
        look()
        return all_reduce(*arguments, **options)

    hooks = [parameter.register_post_accumulate_grad_hook(look) for parameter in trained]
    with patch("torch.distributed.all_reduce", looking):
        train_step(state)
    for hook in hooks:
        hook.remove()
    masters = [p for group in inner.param_groups for p in group["params"]]
    host = optimizer.cpu_offload
    held = {
        **largest,
        "masters": sum(storages(masters).values()),
        "moments": sum(storages(v for entry in inner.state.values() for v in entry.values() if v.ndim).values()),
        "copies": sum(storages(optimizer.param_buffer_of_bit16_for_cpu_offload_groups).values()) if host else 0,
        "host sums": sum(storages(p.grad for p in masters).values()) if host else 0,
    }
    state.close()
    return held


def storages(tensors: Any) -> dict[int, int]:
    """Bytes of the memory of tensors, which may lie in lists and dictionaries, by its address."""
    if isinstance(tensors, torch.Tensor):
        memory = tensors.untyped_storage()
        return {memory.data_ptr(): memory.nbytes()} if memory.nbytes() else {}
    if tensors is None:
        return {}
    found: dict[int, int] = {}
    for entry in tensors.values() if isinstance(tensors, dict) else tensors:
        found |= storages(entry)
    return found


def with_config(tree: dict[str, Any], name: str, bucket: int | None, folder: Path) -> dict[str, Any]:
    """The run with one of the shipped DeepSpeed configs, or with smaller buckets than it says."""
    config = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
    config["zero_optimization"]["reduce_bucket_size"] = bucket or config["zero_optimization"]["reduce_bucket_size"]
    path = folder / "ds.json"
    path.write_text(json.dumps(config))
    return {**tree, "deepspeed": str(path)}


@pytest.mark.parametrize("bucket", [None, 600_000], ids=["as shipped", "smaller than what trains"])
@pytest.mark.parametrize(
    ("name", "ranks", "ep_size", "micro_batch"),
    [("bf16_offload_zero1", 2, 1, 2), ("bf16_offload_zero1", 2, 2, 4), ("bf16_zero2", 2, 1, 2),
     ("bf16_zero2", 2, 1, 4), ("fp32_zero1", 2, 1, 2)],
)  # fmt: skip
def test_with_offloading_and_zero_2_gradients_masters_and_moments_are_what_the_fullest_rank_holds(
    pools: Pools, tree: dict[str, Any], tmp_path: Path, name: str, ranks: int, ep_size: int, micro_batch: int,
    bucket: int | None,
) -> None:  # fmt: skip
    tree = with_config(
        with_parallel(tree, ranks=ranks, ep_size=ep_size, micro_batch_size=micro_batch), name, bucket, tmp_path
    )
    by_rank = pools[ranks].run(held_by_zero, tree, tmp_path)
    held = {kind: max(rank[kind] for rank in by_rank) for kind in by_rank[0]}
    cpu, gpu = (Estimate(parse_run(tree, "x"), ranks, device, ep_size=ep_size) for device in (Device(), GPU))
    on_cpu, on_gpu = cpu.memory(cpu.stages[0]), gpu.memory(gpu.stages[0])
    # The parameter whose gradient comes while the bucket is full, and where a bucket ends, are not in the formula.
    near = 0.02 if bucket is None else 0.12
    assert on_cpu["gradients"] == pytest.approx(held["sums"] + held["host sums"], rel=near)
    assert on_cpu["master weights"] == pytest.approx(held["masters"] + held["copies"], rel=0.02)
    assert on_cpu["moments"] == pytest.approx(held["moments"], rel=0.02)
    assert on_gpu["gradients"] == pytest.approx(held["sums"], rel=near)
    copies = 6 * min(bucket or 10**9, 2_360_448) if name == "bf16_zero2" else 0  # see pipeline/estimate/zero.py
    assert on_gpu["buckets"] == pytest.approx(held["buckets"] + copies, rel=0.01)
    if name == "bf16_offload_zero1":
        assert on_gpu["master weights"] == on_gpu["moments"] == 0
        host = sum(held[kind] for kind in ("masters", "copies", "moments", "host sums"))
        assert on_gpu[OFFLOADED] == pytest.approx(host, rel=0.02)
        assert f"\n{OFFLOADED} " in gpu.text(None)
    else:
        assert on_gpu["master weights"] == on_cpu["master weights"] and OFFLOADED not in on_gpu


def test_the_plan_is_the_runs_own_and_the_network_follows_from_it(tree: dict[str, Any]) -> None:
    estimate = Estimate(parse_run(tree, "x"), 4, Device(), ep_size=2)
    assert estimate.plan.counts == (3, 2, 1, 4)
    assert most_experts(estimate.plan, estimate.dims) == {2: 3, 4: 1}  # the layer of one has it on all four ranks
    stage = estimate.stages[0]
    batch = estimate.batch(stage, estimate.dims)
    network = network_per_token(estimate.sizes, estimate.plan, estimate.dims, batch, dtype=estimate.dtype, stage=stage)
    # Two choices per token, 2/3 and 3/4 of them new experts, half of those away; four trips of 128 bf16 numbers.
    assert network["tokens"] == pytest.approx(2 * (2 / 3 + 3 / 4) / 2 * 4 * 128 * 2)


def test_the_smallest_ep_size_that_fits(tree: dict[str, Any]) -> None:
    run = parse_run(tree, "x")
    whole = Estimate(run, 2, Device.named("80GB"))
    assert whole.smallest_ep_size() == whole.dims.ep_size == 1
    peaks = [whole.memory(whole.stages[0], ParallelDims(2, ep_size))["peak"] for ep_size in (1, 2)]
    assert peaks[1] < peaks[0]
    between = Estimate(run, 2, Device.named(f"{sum(peaks) / 2 / 0.92 / 1e9}GB"))
    assert between.smallest_ep_size() == between.dims.ep_size == 2
    tight = Estimate(run, 2, Device.named("0.5GB"))
    assert tight.smallest_ep_size() is None and tight.dims.ep_size == 2
    assert "does not fit 2 ranks" in tight.text(None)


def test_each_ep_size_within_a_node_is_shown_with_its_cost_and_few_experts_with_a_warning(
    tree: dict[str, Any],
) -> None:
    text = Estimate(parse_run(tree, "x"), 16, Device(), ep_size=4).text(None)
    rows = [line.replace(", any imbalance", "+").split() for line in text.splitlines() if " x " in line]
    # Of 2, 1, 0 and 3 new experts. In groups of two ranks at most: 1, 1, 1 and 5/4.
    assert [(row[0], row[2]) for row in rows if row[0] in "1 2 2+ 4 4+ 8"] == [
        ("1", "1.00"), ("2", "1.06"), ("4", "1.06"), ("8", "1.06"),
    ]  # fmt: skip
    assert "warning: ep_size 4 is more than the new experts of 3 layers" in text and "1.06 x as long" in text
    nodes = {**tree, "cluster": {"stage1": {"gpus_per_node": 2}}}
    assert Estimate(parse_run(nodes, "x"), 16, Device()).ep_sizes() == [1, 2]
    assert "warning" not in Estimate(parse_run(nodes, "x"), 16, Device()).text(None)


def test_offload_and_zero_2_take_less_of_a_gpu(tree: dict[str, Any]) -> None:
    def kinds(config: str, device: Device) -> dict[str, float]:
        estimate = Estimate(parse_run({**tree, "deepspeed": f"ds_configs/{config}.json"}, "x"), 2, device)
        return estimate.memory(estimate.stages[0])

    gpu = Device.named("80GB")
    plain, offloaded = kinds("bf16_zero1", gpu), kinds("bf16_offload_zero1", gpu)
    assert offloaded["master weights"] == offloaded["moments"] == 0 < plain["moments"]
    assert kinds("bf16_offload_zero1", Device())["moments"] == plain["moments"]  # the CPU's memory is the same
    assert kinds("bf16_zero2", gpu)["gradients"] == pytest.approx(plain["gradients"] / 2)  # each rank sums half
    run = parse_run({**tree, "deepspeed": "ds_configs/bf16_zero2.json"}, "x")
    assert Estimate(run, 2, gpu).ep_sizes() == [1]


def test_less_memory_for_more_time(tree: dict[str, Any]) -> None:
    experts = {"allocation": "explicit", "counts": [6, 6, 6, 6]}
    run = parse_run({**tree, "name": "wide", "experts": experts}, "x")
    text = Estimate(run, 4, Device(), ep_size=4).text(None)
    rows = [line.replace(", any imbalance", "+").split() for line in text.splitlines() if " x " in line]
    # Five new experts: three on the fuller rank of two in six times a sixth, or two on the fullest of four.
    assert [row[:4] for row in rows if row[0] in "4 4+"] == [["4", "x", "1.17", "10"], ["4+", "x", "1.50", "5"]]


def test_the_text_says_hours_where_a_speed_is_given_and_asks_for_one_where_not(tree: dict[str, Any]) -> None:
    estimate = Estimate(parse_run(tree, "x"), 1, Device())
    assert "for the hours give --tokens-per-second" in estimate.text(None)
    text = estimate.text(1536.0)
    assert "hours" in text and "unknown" not in text
    for word in (
        "process",
        "weights",
        "gradients",
        "master weights",
        "moments",
        "activations",
        "peak",
        "checkpoint GB",
    ):
        assert word in text


def test_an_unknown_device_and_a_delta_before_similarities_are_one_line(tree: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--device abacus: unknown; use cpu, a100"):
        Device.named("abacus")
    early = {**tree, "name": "early", "experts": {"allocation": "layerwise", "delta": 9.0}}
    with pytest.raises(UserError, match="--until allocate first"):
        Estimate(parse_run(early, "x"), 1, Device())
    spread = {**tree, "name": "early", "experts": {"allocation": "layerwise", "num_new": 6}}
    assert Estimate(parse_run(spread, "x"), 1, Device()).plan.counts == (3, 3, 2, 2)
