"""Options that are off by default: ranks agree, and a resumed run is the uninterrupted one.

Run: pytest tests/distributed/test_options.py
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from pipeline.method.stages import find_stage
from pipeline.run.stages import ADDED_LATER, result_settings
from tests.distributed.conftest import Pools
from tests.distributed.stages import train_steps, with_parallel
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
