"""Baselines: what trains, what it starts from, and that ranks and sessions agree.

Run: pytest tests/distributed/test_baselines.py
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pipeline.checkpoint.inspect import inspect_text
from pipeline.checkpoint.resize import resize
from pipeline.checkpoint.store import complete_tags
from pipeline.checkpoint.tensors import load_tensors, main_file
from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.distributed.process_group import Ranks
from pipeline.evaluation.checkpoints import Scored, load_model
from pipeline.model.backbone import ONE_RANK, load_dense
from pipeline.training.engine import learning_rate_factor
from pipeline.training.sample_order import SampleOrder, stage_order
from tests.distributed.conftest import Pools
from tests.distributed.observed import first_logits
from tests.distributed.stages import move_and_train, stage_inputs, train_steps, with_parallel
from tests.distributed.test_elastic import same_optimizer, spread
from tests.distributed.test_parity import CLOSE, merged
from tests.distributed.test_resume import checkpointing

Tree = dict[str, Any]
CPU = torch.device("cpu")
METHODS: dict[str, Any] = {
    "full": "full",
    "lora": {"name": "lora", "rank": 4},
    "llama_pro": {"name": "llama_pro", "blocks": 3},
}
PRECISIONS = ["fp32_zero1", "bf16_zero1", *(pytest.param(name, marks=pytest.mark.slow)
                                           for name in ("bf16_zero2", "bf16_offload_zero1"))]  # fmt: skip
each_method = pytest.mark.parametrize("method", METHODS)


def with_method(tree: Tree, method: str, **parallel: Any) -> Tree:
    """The same run, its dense model trained by a baseline."""
    return with_parallel({**tree, "method": METHODS[method]}, **parallel)


def model_folder(tree: Tree) -> Path:
    return Path(tree["model"]["path"])


def expected_names(tree: Tree, method: str) -> set[str]:
    """The parameters that a baseline is to train, written out."""
    names = {name for name, _ in load_dense(model_folder(tree), torch.float32).named_parameters()}
    if method == "full":
        return names
    if method == "llama_pro":  # four layers in groups of 1, 1 and 2: copies come after the first, second and last
        return {
            name.replace(".layers.0.", f".layers.{new}.")
            for new in (1, 3, 6)
            for name in names
            if ".layers.0." in name
        }
    parts = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    return {
        f"model.layers.{layer}.{part}.lora_{half}.default.weight"
        for layer in range(4)
        for part in parts
        for half in "AB"
    }


@each_method
def test_what_trains_is_what_the_method_says_and_the_rest_stays(
    pools: Pools, tree: Tree, tmp_path: Path, method: str
) -> None:
    results = pools[2].run(train_steps, with_method(tree, method, ranks=2, micro_batch_size=2), 1, tmp_path, 3, 3)
    expected = expected_names(tree, method)
    for part in results:
        assert set(part["trained"]) == expected
        assert part["frozen_unchanged"]
        assert bool(part["frozen"]) == (method != "full")
        assert set(part["rows"][0]["loss"]) == {"next_token", "balance", "lpr", "classifier"}
        assert [part["rows"][0]["loss"][name] for name in ("balance", "lpr", "classifier")] == [0, 0, 0]
        assert (part["rows"][0]["expert_0_share"], part["rows"][0]["load_imbalance"]) == ({}, [])
    assert set(load_tensors(tmp_path / "step000003" / main_file())["module"]) == expected
    assert not list(tmp_path.glob("step*/layer_*"))
    before = dict(load_dense(model_folder(tree), torch.float32).named_parameters())
    trained = merged(results, "weights")
    if method == "full":
        assert all(not torch.equal(trained[name], before[name]) for name in expected)


@each_method
def test_a_baseline_begins_as_the_dense_model(pools: Pools, tree: Tree, tmp_path: Path, method: str) -> None:
    changed = with_method(tree, method, micro_batch_size=4)
    logits = pools[1].run(first_logits, changed, 1, tmp_path)[0]
    ids = torch.from_numpy(order_of(changed, tmp_path).batch(0, 4).ids)
    with torch.no_grad():
        expected = load_dense(model_folder(tree), torch.float32)(input_ids=ids, use_cache=False).logits
    assert torch.equal(logits, expected)


def order_of(tree: Tree, folder: Path) -> SampleOrder:
    """The samples of a run's stage 1."""
    inputs = stage_inputs(tree, 1, folder, Ranks(0, 1, CPU))
    return stage_order(inputs.store, inputs.run.data, inputs.stage, inputs.plan, inputs.run.seed)


@pytest.mark.parametrize("old_share", [0.0, 0.25])
def test_a_baseline_reads_the_samples_that_the_mixtures_stage_1_reads(
    tree: Tree, tmp_path: Path, old_share: float
) -> None:
    replayed = {**tree, "stage1": tree["stage1"] | {"old_share": old_share}}
    ours, expected = (order_of(run, tmp_path) for run in (with_method(replayed, "full"), replayed))
    assert ours.num_samples == expected.num_samples == 6 * 8
    for step in range(6):
        mine, theirs = (order.batch(step * 8, 8) for order in (ours, expected))
        assert (mine.ids == theirs.ids).all() and (mine.sources == theirs.sources).all()
        assert ours.old_tokens(step * 8, 8) == old_share * 8 * 32


@each_method
def test_activation_checkpointing_changes_no_result(pools: Pools, tree: Tree, tmp_path: Path, method: str) -> None:
    plain = with_method(tree, method, micro_batch_size=4)
    expected = pools[1].run(train_steps, plain, 1, tmp_path / "plain", 2)[0]
    ours = pools[1].run(train_steps, checkpointing(plain, 1), 1, tmp_path / "checkpointed", 2)[0]
    assert ours["rows"][-1]["loss"] == pytest.approx(expected["rows"][-1]["loss"], rel=1e-5)
    for name, tensor in expected["weights"].items():
        torch.testing.assert_close(ours["weights"][name], tensor, rtol=1e-5, atol=1e-6)


def test_full_fine_tuning_is_what_a_plain_loop_does(pools: Pools, tree: Tree, tmp_path: Path) -> None:
    changed = with_method(tree, "full", ranks=2, micro_batch_size=2)
    result = pools[2].run(train_steps, changed, 1, tmp_path, 4)
    settings, order = stage_inputs(changed, 1, tmp_path, Ranks(0, 1, CPU)).stage.settings, order_of(changed, tmp_path)
    model = load_dense(model_folder(tree), torch.float32).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
    )
    for step in range(4):
        batch = order.batch(step * settings.global_batch_size, settings.global_batch_size)
        logits = model(input_ids=torch.from_numpy(batch.ids), use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(batch.labels).flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clipping)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * learning_rate_factor(step, settings)
        optimizer.step()
        optimizer.zero_grad()
        row = result[0]["rows"][step]
        assert row["loss"]["next_token"] == pytest.approx(loss.item(), rel=1e-6 if step == 0 else 1e-4)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-5 if step == 0 else 1e-3)


@each_method
def test_two_ranks_compute_what_one_does(pools: Pools, tree: Tree, tmp_path: Path, method: str) -> None:
    results = []
    for ranks in (1, 2):
        changed = with_method(tree, method, ranks=ranks, micro_batch_size=4 // ranks)
        results.append(pools[ranks].run(train_steps, changed, 1, tmp_path / str(ranks), 4))
    one, two = results
    for ours, expected in zip(two[0]["rows"], one[0]["rows"], strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-5, abs=1e-6)
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    ours, expected = merged(two, "gradients"), merged(one, "gradients")
    assert ours.keys() == expected.keys() == set(one[0]["trained"])
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("precision", PRECISIONS)
@each_method
def test_6_steps_equal_3_steps_then_resume_then_3_steps(
    pools: Pools, tree: Tree, tmp_path: Path, method: str, precision: str
) -> None:
    changed = with_method(tree, method, ranks=2, micro_batch_size=2) | {"deepspeed": f"ds_configs/{precision}.json"}
    if method == "lora":
        changed["method"] = {**METHODS["lora"], "dropout": 0.1}  # what is drawn is the same again too
    straight = pools[2].run(train_steps, changed, 1, tmp_path / "straight", 6)
    pools[2].run(train_steps, changed, 1, tmp_path / "resumed", 3, 3)
    assert complete_tags(tmp_path / "resumed") == ["step000003"]
    resumed = pools[2].run(train_steps, changed, 1, tmp_path / "resumed", 6, None, True)
    for ours, expected in zip(resumed, straight, strict=True):
        assert ours["rows"] == expected["rows"][3:]
        assert ours["weights"].keys() == expected["weights"].keys()
        assert all(torch.equal(ours["weights"][name], tensor) for name, tensor in expected["weights"].items())
        assert all(torch.equal(a, b) for a, b in zip(ours["optimizer"], expected["optimizer"], strict=True))


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
@pytest.mark.parametrize("ranks", [(2, 1), (1, 4)], ids=["2 to 1", "1 to 4"])
@each_method
def test_resumed_on_other_ranks_the_optimizer_is_exact(
    pools: Pools, tree: Tree, tmp_path: Path, method: str, ranks: tuple[int, int], precision: str
) -> None:
    source, target = (ParallelDims(count, 1) for count in ranks)
    changed = {**tree, "method": METHODS[method], "deepspeed": f"ds_configs/{precision}_zero1.json"}
    expected = pools[ranks[0]].run(train_steps, spread(changed, source), 1, tmp_path / "saved", 4, 3)[0]["rows"][3:]
    resumed = pools[ranks[1]].run(
        move_and_train, spread(changed, target), 1, tmp_path / "saved", tmp_path / "moved", 4
    )[0]
    same_optimizer(tmp_path / "moved" / "step000003", tmp_path / "saved" / "step000003")
    for row, other in zip(resumed, expected, strict=True):
        rel = 1e-5 if precision == "fp32" else 2e-2
        assert row["loss"]["next_token"] == pytest.approx(other["loss"]["next_token"], rel=rel)


@each_method
def test_a_checkpoint_is_inspected_and_resized(pools: Pools, tree: Tree, tmp_path: Path, method: str) -> None:
    alone, both = ParallelDims(1, 1), ParallelDims(2, 1)
    changed = {**tree, "method": METHODS[method]}
    pools[2].run(train_steps, spread(changed, both), 1, tmp_path, 3, 3)
    text = inspect_text(tmp_path / "step000003")
    assert f"{'method':22}{method}" in text and "experts" not in text
    resized = resize(tmp_path / "step000003", alone)
    same_optimizer(resized, tmp_path / "step000003")
    rows = pools[1].run(move_and_train, spread(changed, alone), 1, tmp_path, tmp_path / "on", 4)[0]
    assert [row["step"] for row in rows] == [4]


@each_method
def test_evaluation_loads_the_weights_that_training_has_saved(
    pools: Pools, tree: Tree, tmp_path: Path, method: str
) -> None:
    changed = with_method(tree, method, micro_batch_size=4)
    trained = pools[1].run(train_steps, changed, 1, tmp_path, 3, 3)[0]["weights"]
    inputs = stage_inputs(changed, 1, tmp_path, Ranks(0, 1, CPU))
    scored = Scored("stage1", (tmp_path / "step000003",), {})
    model = load_model(scored, inputs.untrained, torch.float32, ONE_RANK, CPU)
    loaded = dict(model.named_parameters())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in trained.items())
