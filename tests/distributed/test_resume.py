"""A resumed run is the uninterrupted one, bit by bit. Run: pytest tests/distributed/test_resume.py"""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoint.store import best, complete_tags, mark_best
from pipeline.checkpoint.tensors import expert_file, load_tensors, main_file
from pipeline.records.record import read_rows
from tests.distributed.conftest import Pools
from tests.distributed.observed import engines_left, exchanges, kept_from_the_collector, kernels_are_deterministic
from tests.distributed.stages import train_steps, train_to_the_end, with_parallel
from tests.helpers.rows import TIMING
from tests.helpers.tiny import prepared_run, run_tree


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("resume")
    prepared_run(folder)
    return with_parallel(run_tree(folder), ranks=2, ep_size=2, micro_batch_size=2)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_offload"])
@pytest.mark.parametrize("number", [1, 2], ids=["stage1", "stage2"])
def test_6_steps_equal_3_steps_then_resume_then_3_steps(
    pools: Pools, tree: dict[str, Any], tmp_path: Path, number: int, precision: str
) -> None:
    tree = {**tree, "deepspeed": f"ds_configs/{precision}_zero1.json"}
    straight = pools[2].run(train_steps, tree, number, tmp_path / "straight", 6)
    pools[2].run(train_steps, tree, number, tmp_path / "resumed", 3, 3)
    assert complete_tags(tmp_path / "resumed") == ["step000003"]
    resumed = pools[2].run(train_steps, tree, number, tmp_path / "resumed", 6, None, True)
    for ours, expected in zip(resumed, straight, strict=True):
        assert ours["rows"] == expected["rows"][3:]  # losses, learning rate, gradient norm, routing: exactly
        assert ours["weights"].keys() == expected["weights"].keys()
        for name, tensor in expected["weights"].items():
            assert torch.equal(ours["weights"][name], tensor), name
        for mine, theirs in zip(ours["optimizer"], expected["optimizer"], strict=True):
            assert torch.equal(mine, theirs)


def test_a_signal_to_one_rank_stops_all_after_a_save_and_the_next_run_ends_the_same(
    pools: Pools, tree: dict[str, Any], tmp_path: Path
) -> None:
    tree = {**tree, "validate": {"every_tokens": 512, "max_tokens_per_set": 100}}
    done = pools[2].run(train_to_the_end, tree, 1, tmp_path / "straight")
    assert pools[2].run(train_to_the_end, tree, 1, tmp_path / "stopped", 4) == [None, None]
    assert complete_tags(tmp_path / "stopped")[0] == "step000004"
    again = pools[2].run(train_to_the_end, tree, 1, tmp_path / "stopped")
    assert [figures["tag"] for figures in (*done, *again)] == ["step000006"] * 4
    for name in ("metrics.jsonl", "validation.jsonl"):
        ours, expected = (
            [{k: v for k, v in row.items() if k not in TIMING} for row in read_rows(tmp_path / folder / name)]
            for folder in ("stopped", "straight")
        )
        assert ours == expected
    assert best(tmp_path / "stopped") == best(tmp_path / "straight")


def test_a_stage_that_has_ended_holds_no_memory_of_the_next_one(
    pools: Pools, tree: dict[str, Any], tmp_path: Path
) -> None:
    assert pools[2].run(engines_left, tree, 1, tmp_path) == [0, 0]


def test_no_garbage_is_looked_for_among_imports_while_an_engine_is_built(
    pools: Pools, tree: dict[str, Any], tmp_path: Path
) -> None:
    assert min(pools[2].run(kept_from_the_collector, tree, tmp_path)) > 100_000


def test_deterministic_asks_torch_for_such_kernels_and_changes_nothing_on_a_cpu(
    pools: Pools, tree: dict[str, Any], tmp_path: Path
) -> None:
    losses = []
    for deterministic in (True, False):
        spread = with_parallel(tree, ranks=2, ep_size=2, micro_batch_size=2, deterministic=deterministic)
        folder = tmp_path / str(deterministic)
        found = pools[2].run(kernels_are_deterministic, spread, 1, folder)
        assert found == [[deterministic] * len(found[0])] * 2
        losses.append([row["loss"] for row in read_rows(folder / "metrics.jsonl")])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("number", [1, 2], ids=["stage1", "stage2"])
def test_activation_checkpointing_changes_no_result(
    pools: Pools, tree: dict[str, Any], tmp_path: Path, number: int
) -> None:
    plain = pools[2].run(train_steps, tree, number, tmp_path / "plain", 2)
    checkpointed = pools[2].run(train_steps, checkpointing(tree, number), number, tmp_path / "checkpointed", 2)
    for ours, expected in zip(checkpointed, plain, strict=True):
        assert ours["rows"][-1]["loss"] == pytest.approx(expected["rows"][-1]["loss"], rel=1e-5)
        for name, tensor in expected["weights"].items():
            torch.testing.assert_close(ours["weights"][name], tensor, rtol=1e-5, atol=1e-6)


def checkpointing(tree: dict[str, Any], number: int) -> dict[str, Any]:
    stage = f"stage{number}"
    return {**tree, stage: {**tree[stage], "activation_checkpointing": True}}


def test_activation_checkpointing_exchanges_no_rows_again(pools: Pools, tree: dict[str, Any], tmp_path: Path) -> None:
    plain = pools[2].run(exchanges, tree, 1, tmp_path / "plain")
    micro_steps = 8 // (2 * tree["parallel"]["micro_batch_size"])
    # Two layers of several new experts: counts, rows out, rows back, and two gradients; the first layer's input needs
    # none, but its experts do.
    assert plain == [micro_steps * 2 * 5] * 2
    assert pools[2].run(exchanges, checkpointing(tree, 1), 1, tmp_path / "checkpointed") == plain


def test_a_checkpoint_holds_what_trains_and_nothing_else(pools: Pools, tree: dict[str, Any], tmp_path: Path) -> None:
    for number in (1, 2):
        pools[2].run(train_steps, tree, number, tmp_path / f"stage{number}", 1, 1)
    stage1, stage2 = tmp_path / "stage1" / "step000001", tmp_path / "stage2" / "step000001"
    experts = {expert_file(layer, n) for layer, count in enumerate((2, 1, 3)) for n in range(count)}
    assert {p.name for p in stage1.glob("layer_*")} == experts
    assert not list(stage2.glob("layer_*"))
    routers = {f"model.layers.{layer}.mlp.deepspeed_moe.gate.wg.weight" for layer in (0, 1, 3)}
    classifiers = {f"model.layers.{layer}.mlp.deepspeed_moe.gate.classifier.weight" for layer in (0, 3)}
    assert set(load_tensors(stage1 / main_file())["module"]) == routers
    assert set(load_tensors(stage2 / main_file())["module"]) == routers | classifiers
    assert load_tensors(stage1 / main_file())["num_experts"] == [2, 1, 3]  # those with a file
    # Expert files are keyed by the number that their name says.
    for layer, count in zip((0, 1, 3), (2, 1, 3), strict=True):
        for number in range(count):
            file = stage1 / expert_file((0, 1, 3).index(layer), number)
            assert all(f"deepspeed_experts.{number}." in key for key in load_tensors(file))


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    pools: Pools, tree: dict[str, Any], tmp_path: Path
) -> None:
    tree = {**tree, "checkpoint": {"every_minutes": None, "keep": 3}}
    pools[2].run(train_steps, tree, 1, tmp_path, 2, 2)
    pools[2].run(train_steps, tree, 1, tmp_path, 3, 3, True)
    bad = tmp_path / "step000003" / expert_file(0, 1)
    content = bytearray(bad.read_bytes())
    content[len(content) // 2] ^= 1
    bad.write_bytes(content)
    rows = pools[2].run(train_steps, tree, 1, tmp_path, 4, None, True)[0]["rows"]
    assert [row["step"] for row in rows] == [3, 4]


def test_only_the_newest_and_the_best_are_kept(pools: Pools, tree: dict[str, Any], tmp_path: Path) -> None:
    tree = {**tree, "checkpoint": {"every_minutes": None, "keep": 2}}
    for step in (1, 2, 3, 4):
        pools[2].run(train_steps, tree, 2, tmp_path, step, step, True)
        if step == 1:
            mark_best(tmp_path, "step000001", 1.0)
    assert complete_tags(tmp_path) == ["step000004", "step000003", "step000001"]
    assert (tmp_path / "latest").read_text() == "step000004"
