"""Whole runs of the baselines, up to report and comparison, and what makes their steps stale.

Run: pytest tests/distributed/test_baseline_runs.py
"""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.errors import UserError
from pipeline.comparison.write import compare_runs
from pipeline.distributed.process_group import Ranks
from pipeline.estimate.device import Device
from pipeline.estimate.report import Estimate
from pipeline.evaluation.checkpoints import load_scored
from pipeline.evaluation.generate import Sampling
from pipeline.method.untrained import dense_parameter_counts
from pipeline.model.backbone import ONE_RANK
from pipeline.model.model_folder import model_config
from pipeline.records.comparison import Comparison
from pipeline.records.evaluation import Evaluation
from pipeline.records.run_folder import EVALUATION_FILE, REPORT_FILE
from pipeline.run.changes import differences, explain
from pipeline.run.context import RunContext
from pipeline.run.exporting import export_run
from pipeline.run.generating import generate
from pipeline.run.runner import do_step
from pipeline.run.scoring import models_to_score
from pipeline.run.steps import STEPS, step_named, steps_of
from tests.distributed.conftest import Pools
from tests.distributed.observed import held_bytes
from tests.distributed.stages import with_parallel
from tests.distributed.test_baselines import METHODS, each_method, with_method
from tests.distributed.test_staleness import entries, run
from tests.helpers.tiny import parse_run, run_tree

Tree = dict[str, Any]
BASELINE = ["tokenize", "stage1", "evaluate"]


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory, pools: Pools) -> dict[str, Tree]:
    """By name, runs of one cache that are done: each baseline, full with replay, and the mixture without review."""
    base = run_tree(tmp_path_factory.mktemp("baselines"), validate={"every_tokens": 768})
    trees = {name: {**base, "name": name, "method": method} for name, method in METHODS.items()}
    trees["replay"] = {**trees["full"], "name": "replay", "stage1": base["stage1"] | {"old_share": 0.25}}
    trees["no-review"] = {**base, "name": "no-review", "stage2": None}
    for name, tree in trees.items():
        of_experts = {"similarity", "allocate", "upcycle"} if name == "no-review" else set()
        assert set(run(pools, tree)) == {*BASELINE} | of_experts
        assert run(pools, tree) == []
    return trees


def folder_of(tree: Tree) -> Path:
    return Path(tree["output_dir"]) / tree["name"]


def test_runs_of_the_same_text_share_their_tokens_and_the_dense_models_scores(trees: dict[str, Tree]) -> None:
    assert len(entries(trees["full"], "tokens")) == len(["en", "el", "hu"])
    sets, models = 3, 1 + len(trees)
    assert len(entries(trees["full"], "scores")) == sets * models


@each_method
def test_a_baselines_folder_holds_one_stage_and_nothing_of_experts(trees: dict[str, Tree], method: str) -> None:
    folder = folder_of(trees[method])
    there = {path.name for path in folder.iterdir()}
    assert not there & {"similarity.json", "expert_plan.json", "upcycled", "stage2"}
    evaluation = Evaluation.load(folder / EVALUATION_FILE)
    assert (evaluation.checkpoints, evaluation.routing) == (["base", "stage1"], {})
    assert all(result.change["stage1"].percent < 0 for result in evaluation.sets.values() if result.group == "new")
    assert "best" in (folder / "stage1" / "validation.jsonl").read_text()


def test_parameters_are_counted_as_they_are(trees: dict[str, Tree]) -> None:
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32  # q, o; k, v; gate, up, down; two norms
    dense = 2 * 300 * 32 + 4 * layer + 32
    adapters = 4 * 4 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 48) * 3)  # of rank 4, in four layers
    expected = {
        "full": (dense, dense),
        "lora": (dense + adapters, adapters),
        "llama_pro": (dense + 3 * layer, 3 * layer),
    }
    for method, (total, trained) in expected.items():
        found = Evaluation.load(folder_of(trees[method]) / EVALUATION_FILE).parameters
        assert found == {"dense": dense, "total": total, "active": total, "stage1_trained": trained}


def test_a_baseline_and_the_dense_model_continue_a_prompt(
    trees: dict[str, Tree], capsys: pytest.CaptureFixture[str]
) -> None:
    generate(RunContext(parse_run(trees["lora"], "x")), ["house river"], None, Sampling(4), shows_experts=True)
    assert re.findall(r"--- (\w+)\n(house river)", capsys.readouterr().out) == [
        ("base", "house river"), ("stage1", "house river"),
    ]  # fmt: skip


@each_method
def test_the_report_names_the_baseline_and_shows_no_routing(
    trees: dict[str, Tree], method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    do_step(RunContext(parse_run(trees[method], "x")), step_named("report"))
    assert "parameters 0.1 M -> 0.1 M" in capsys.readouterr().out
    page = (folder_of(trees[method]) / REPORT_FILE).read_text()
    assert f"Baseline <b>{method}</b>" in page
    assert "Next-token loss" in page and "Bits per character by set" in page
    of_experts = ("Tokens on expert 0", "Routing on held-out text", "Experts by layer", "Load imbalance")
    assert not [text for text in of_experts if text in page]


def test_baselines_are_compared_with_a_mixture_without_review(trees: dict[str, Tree], tmp_path: Path) -> None:
    names = ["full", "replay", "lora", "llama_pro", "no-review"]
    found = compare_runs([str(folder_of(trees[name])) for name in names], str(folder_of(trees["no-review"])), tmp_path)
    assert Comparison.load(tmp_path / "compare.json") == found
    runs = {one.name: one for one in found.runs}
    assert list(runs) == names and not found.notes
    assert {one.checkpoint for one in found.runs} == {"stage1"}
    assert set(found.paired) == {*names} - {"no-review"}
    flops = {name: one.flops for name, one in runs.items()}
    assert flops["full"] == flops["replay"]
    tokens = runs["full"].tokens["stage1"]
    per_layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    attention = 2 * 32 * 32  # 2 L H
    # Forward, gradients of inputs and of weights; the head too. Attention has no weights, and twice the backward.
    assert flops["full"] == tokens * (4 * (6 * per_layer + 3 * attention) + 6 * 300 * 32)
    assert flops["lora"] < flops["full"] and flops["llama_pro"] > flops["lora"]


def test_replay_draws_that_share_of_old_samples_in_the_order_of_other_runs(trees: dict[str, Tree]) -> None:
    context = RunContext(parse_run(trees["replay"], "x"))
    assert context.stage(1).shares() == {"old": 0.25, "new": 0.75}
    rows = [json.loads(line) for line in (folder_of(trees["replay"]) / "stage1" / "metrics.jsonl").open()]
    assert len(rows) == 6
    figures = context.folder.manifest("stage1").figures
    assert set(figures["epochs"]) == {"en", "el", "hu"}


@each_method
def test_steps_that_do_not_apply_say_so(
    trees: dict[str, Tree], method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    context = RunContext(parse_run(trees[method], "x"))
    assert all(step.is_done(context) for step in steps_of(context.run) if step.keeps_manifest)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "tokenize: done, skipped",
        *(f"{step}: method {method} has no experts, skipped" for step in ("similarity", "allocate", "upcycle")),
        "stage1: done, skipped",
        f"stage2: method {method} has no routers to review, skipped",
        "evaluate: done, skipped",
    ]


CHANGES = [
    ("full", "stage1.lr", 1e-3, {"stage1"}),
    ("full", "stage1.old_share", 0.3, {"stage1"}),
    ("full", "method", "lora", {"stage1"}),
    ("lora", "method.rank", 2, {"stage1"}),
    ("lora", "method.alpha", 8, {"stage1"}),
    ("lora", "method.dropout", 0.1, {"stage1"}),
    ("lora", "method.targets", "mlp", {"stage1"}),
    ("llama_pro", "method.blocks", 2, {"stage1"}),
    # What concerns experts, routers and stage 2 alone does nothing.
    ("full", "experts", {"num_new": 8}, set()),
    ("full", "stage1.lpr_weight", 0.2, set()),
    ("full", "stage1.z_loss_weight", 0.2, set()),
    ("full", "stage1.balance", "bias", set()),
    ("full", "stage2.lr", 0.2, set()),
    ("full", "stage2", None, set()),
    ("full", "similarity.tokens", 100, set()),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: f"{change[0]}, {change[1]}")
def test_a_key_makes_those_steps_stale_that_read_it(
    trees: dict[str, Tree], change: tuple[str, str, Any, set[str]]
) -> None:
    method, key, value, expected = change
    tree = copy.deepcopy(trees[method])
    *parents, last = key.split(".")
    section = tree
    for part in parents:
        section = section[part]
    section[last] = value
    before = RunContext(parse_run(trees[method], "x"), quiet=True)
    now = RunContext(parse_run(tree, "x"), quiet=True)
    stale = set()
    for name in BASELINE:
        changes = differences(step_named(name).inputs(before), step_named(name).inputs(now))
        if changes:
            stale.add(name)
            [line] = explain(name, changes, before.settings, now.settings)
            assert line.startswith(key), line
    assert stale == expected


def test_another_method_in_the_same_folder_is_refused_and_named(trees: dict[str, Tree]) -> None:
    changed = {**trees["full"], "method": {"name": "lora", "rank": 8}}
    with pytest.raises(UserError, match=r"stage1: done in .* with other inputs: method.name was full, is lora"):
        step_named("stage1").is_done(RunContext(parse_run(changed, "x")))
    to_moe = {**trees["full"], "method": "moe"}
    assert {step.name for step in STEPS if step.applies(parse_run(to_moe, "x"))} == {step.name for step in STEPS}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@each_method
def test_the_estimate_is_what_a_rank_holds(
    pools: Pools, tree: Tree, tmp_path: Path, method: str, precision: str, ranks: int
) -> None:
    changed = with_method(tree, method, ranks=ranks, micro_batch_size=2)
    changed["deepspeed"] = f"ds_configs/{precision}_zero1.json"
    held = pools[ranks].run(held_bytes, changed, 1, tmp_path)[0]
    estimate = Estimate(parse_run(changed, "x"), ranks, Device.named(None))
    expected = estimate.memory(estimate.stages[0])
    for kind in ("weights", "master weights", "moments"):
        assert held[kind] == pytest.approx(expected[kind], rel=1e-3), kind
    if precision == "bf16":  # in fp32 DeepSpeed has no buffer of its own
        assert held["gradients"] == pytest.approx(4 * estimate.sizes.trained, rel=1e-3)


@each_method
def test_the_estimate_says_what_trains_and_whether_it_fits(tree: Tree, method: str) -> None:
    run_config = parse_run(with_parallel({**tree, "method": METHODS[method]}, ranks=4), "x")
    text = Estimate(run_config, 4, Device.named("80GB")).text(100.0)
    counts = dense_parameter_counts(model_config(Path(tree["model"]["path"])), run_config.method)
    assert f"with method {method}; {counts['stage1_trained'] / 1e6:,.1f} M train" in text.splitlines()[0]
    assert "experts" not in text and "stage 2" not in text
    assert text.splitlines()[-1].startswith("fits 4 ranks")


@each_method
def test_an_export_is_a_plain_model_with_the_logits_of_training(
    trees: dict[str, Tree], method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    context = RunContext(parse_run(trees[method], "x"))
    with pytest.raises(UserError, match=f"method {method} trains a dense model, not a mixture; leave it out"):
        export_run(context, None, "fp32", tmp_path / "exported", "mixtral")
    export_run(context, None, "fp32", tmp_path / "exported", "auto")
    assert f"--native auto is not needed: method {method}'s model is dense" in capsys.readouterr().out
    scored = models_to_score(context, "stage1")[-1]
    trained = load_scored(scored, context.dense, torch.float32, Ranks(0, 1, torch.device("cpu")), ONE_RANK)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    ids = torch.arange(30).view(2, 15) * 7 % 290
    with torch.no_grad():
        torch.testing.assert_close(exported(ids).logits, trained(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    assert not list((tmp_path / "exported").glob("*.py"))
    assert f"by {method}" in (tmp_path / "exported" / "README.md").read_text()
