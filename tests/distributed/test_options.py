"""Options that are off by default: ranks agree, and a resumed run is the uninterrupted one.

Run: pytest tests/distributed/test_options.py
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from pipeline.checkpoint.store import read_manifest
from pipeline.checkpoint.tensors import load_tensors, main_file
from pipeline.method.stages import find_stage
from pipeline.records.checkpoint import CheckpointManifest
from pipeline.run.stages import ADDED_LATER, result_settings
from tests.distributed.conftest import Pools
from tests.distributed.stages import biases_to_score, train_steps, train_with_bad_steps, with_parallel
from tests.distributed.test_parity import CLOSE, merged
from tests.helpers.tiny import parse_run

Tree = dict[str, Any]


class Option(NamedTuple):
    """Settings of a stage that turn an option on, and the name of its loss, if it has one."""

    stage: int
    settings: Tree
    loss: str | None

    def on(self, tree: Tree) -> Tree:
        """The same run with it."""
        name = f"stage{self.stage}"
        return {**tree, name: tree[name] | self.settings}


OPTIONS = {
    "z-loss, stage 1": Option(1, {"z_loss_weight": 0.1}, "router_z"),
    "z-loss, stage 2": Option(2, {"z_loss_weight": 0.1}, "router_z"),
    "bias": Option(1, {"balance": "bias", "bias_update_rate": 0.05}, None),
    "router KL": Option(2, {"router_kl_weight": 5.0}, "router_kl"),
}
each_option = pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)


@each_option
def test_two_ranks_compute_the_same_as_one(pools: Pools, tree: Tree, tmp_path: Path, option: Option) -> None:
    results = []
    for ranks in (1, 2):
        spread = with_parallel(option.on(tree), ranks=ranks, ep_size=ranks, micro_batch_size=4 // ranks)
        results.append(pools[ranks].run(train_steps, spread, option.stage, tmp_path / str(ranks), 4))
    one, two = results
    for ours, expected in zip(two[0]["rows"], one[0]["rows"], strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-5, abs=1e-6)
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    if option.loss is not None:
        assert one[0]["rows"][-1]["loss"][option.loss] > 0
    ours, expected = merged(two, "weights"), merged(one, "weights")
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
    assert same_biases(two[0], one[0]) and same_biases(two[0], two[1])


def same_biases(ours: Tree, expected: Tree) -> bool:
    """Whether all selection biases are the same, bit by bit."""
    return all(torch.equal(bias, other) for bias, other in zip(ours["biases"], expected["biases"], strict=True))


@each_option
def test_6_steps_equal_3_steps_then_resume_then_3_steps(
    pools: Pools, tree: Tree, tmp_path: Path, option: Option
) -> None:
    spread = with_parallel(option.on(tree), ranks=2, ep_size=2, micro_batch_size=2)
    straight = pools[2].run(train_steps, spread, option.stage, tmp_path / "straight", 6)
    pools[2].run(train_steps, spread, option.stage, tmp_path / "resumed", 3, 3)
    resumed = pools[2].run(train_steps, spread, option.stage, tmp_path / "resumed", 6, None, True)
    for ours, expected in zip(resumed, straight, strict=True):
        assert ours["rows"] == expected["rows"][3:]
        assert ours["weights"].keys() == expected["weights"].keys()
        assert all(torch.equal(ours["weights"][name], tensor) for name, tensor in expected["weights"].items())
        assert same_biases(ours, expected)


def test_stage_2_is_held_to_the_routers_of_the_stage_1_checkpoint_also_after_a_resume(
    pools: Pools, tree: Tree, tmp_path: Path
) -> None:
    spread = with_parallel(OPTIONS["router KL"].on(tree), ranks=2, ep_size=2, micro_batch_size=2)
    pools[2].run(train_steps, spread, 1, tmp_path / "stage1", 2, 2)
    stage1 = tmp_path / "stage1" / "step000002"
    started = pools[2].run(train_steps, spread, 2, tmp_path / "stage2", 2, 2, False, stage1)
    resumed = pools[2].run(train_steps, spread, 2, tmp_path / "stage2", 3, None, True, stage1)
    first, second, third = [row["loss"]["router_kl"] for row in started[0]["rows"] + resumed[0]["rows"]]
    assert first == 0.0  # the upcycled routers are other ones
    assert second > 0.0 and third > 0.0  # resumed routers are not their own reference


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_bias_is_saved_resumed_on_any_ranks_kept_in_stage_2_and_scored_with(
    pools: Pools, tree: Tree, tmp_path: Path, precision: str
) -> None:
    biased = OPTIONS["bias"].on(tree) | {"deepspeed": f"ds_configs/{precision}_zero1.json"}
    two, one = (with_parallel(biased, ranks=n, ep_size=n, micro_batch_size=4 // n) for n in (2, 1))
    folder = tmp_path / "stage1"
    trained = pools[2].run(train_steps, two, 1, folder, 3, 3)[0]
    assert [bias.dtype for bias in trained["biases"]] == [torch.float32] * 3
    steps = trained["biases"][2] / 0.05  # of the layer with most experts
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-5)
    assert steps.abs().max() >= 1 and steps.abs().max() <= 3
    checkpoint = folder / "step000003"
    assert read_manifest(checkpoint, CheckpointManifest).selection_biases
    assert same_biases(pools[1].run(train_steps, one, 1, folder, 3, None, True)[0], trained)
    for found in pools[2].run(biases_to_score, two, checkpoint):
        assert same_biases({"biases": found}, trained)
    for part in pools[2].run(train_steps, two, 2, tmp_path / "stage2", 2, 2, False, checkpoint):
        assert same_biases(part, trained)
    for part in pools[2].run(train_steps, two, 2, tmp_path / "stage2", 3, None, True, checkpoint):
        assert same_biases(part, trained)


def test_a_checkpoint_without_biases_gives_none(pools: Pools, tree: Tree, tmp_path: Path) -> None:
    alone = with_parallel(tree, micro_batch_size=4)
    assert pools[1].run(train_steps, alone, 1, tmp_path / "stage1", 1, 1)[0]["biases"] == []
    checkpoint = tmp_path / "stage1" / "step000001"
    assert set(load_tensors(checkpoint / main_file())["module"]) == {
        f"model.layers.{layer}.mlp.deepspeed_moe.gate.wg.weight" for layer in (0, 1, 3)
    }
    assert pools[1].run(biases_to_score, alone, checkpoint) == [[]]
    assert pools[1].run(train_steps, alone, 2, tmp_path / "stage2", 1, None, False, checkpoint)[0]["biases"] == []


def test_a_skipped_step_moves_no_bias(pools: Pools, tree: Tree, tmp_path: Path) -> None:
    spread = with_parallel(OPTIONS["bias"].on(tree), ranks=2, ep_size=2, micro_batch_size=2)
    for part in pools[2].run(train_with_bad_steps, spread, 1, tmp_path, {2: float("nan")}):
        first, second, third = ({"biases": biases} for biases in part["biases"][:3])
        assert part["figures"]["skipped_steps"] == 1
        assert same_biases(first, second) and not same_biases(second, third)


@each_option
def test_activation_checkpointing_changes_no_result(pools: Pools, tree: Tree, tmp_path: Path, option: Option) -> None:
    plain = with_parallel(option.on(tree), micro_batch_size=4)
    checkpointed = option._replace(settings={"activation_checkpointing": True}).on(plain)
    found, expected = (
        pools[1].run(train_steps, each, option.stage, tmp_path / name, 2)[0]
        for name, each in (("checkpointed", checkpointed), ("plain", plain))
    )
    assert found["rows"][-1]["loss"] == pytest.approx(expected["rows"][-1]["loss"], rel=1e-5)
    for name, tensor in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("number", [1, 2])
def test_an_option_that_is_off_is_not_among_the_inputs_of_a_stage(tree: Tree, number: int) -> None:
    settings = find_stage(parse_run(tree, "tiny.yaml"), number).settings
    of_the_stage = ADDED_LATER & type(settings).model_fields.keys()
    assert of_the_stage and not of_the_stage & result_settings(settings).keys()
