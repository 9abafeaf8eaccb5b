"""A run that only reviews the model of its base, with no new experts. Run: pytest tests/distributed/test_review.py"""

from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.files import read_json
from data_prep.config import PreparationConfig
from pipeline.cli.main import main
from pipeline.cluster.jobs import jobs_of
from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.estimate.device import Device
from pipeline.estimate.report import Estimate
from pipeline.records.run_folder import VALIDATION_BASE_FILE
from pipeline.run.context import RunContext
from tests.distributed.conftest import Pools
from tests.distributed.rounds import BALANCED, Model, imported, run, same, tree_of, with_changes
from tests.helpers.tiny import parse_run

Tree = dict[str, Any]


def review_of(tree: Tree, base: Any, **changes: Any) -> Tree:
    """The settings of a run that goes on with stage 2 from a base."""
    left = {key: value for key, value in tree.items() if key not in ("model", "stage1")}
    return {**left, "name": "review", "base": base, "experts": {"allocation": "keep"}, **changes}


@pytest.fixture(scope="module")
def first(pools: Pools, tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """A run of both stages that is done."""
    tree = two_languages(tmp_path_factory.mktemp("review"))
    run(pools, tree, 1)
    return tree


def two_languages(folder: Path) -> Tree:
    """The settings of a first round that teaches Greek and Hungarian."""
    tree, second = tree_of(folder, 0, ranks=1), tree_of(folder, 1)
    tree["data"]["new"] |= second["data"]["new"]
    return tree


def stage1_of(tree: Tree) -> Tree:
    """Stage 1 of a run as a base."""
    return {"run": str(RunContext(parse_run(tree, "x")).run.folder), "checkpoint": "stage1"}


@pytest.mark.parametrize("how", ["run", "import"])
@pytest.mark.parametrize("changes", [{}, BALANCED], ids=["", "balanced by biases"])
def test_reviewing_a_stage_1_is_the_stage_2_of_its_run_bit_by_bit(
    pools: Pools, first: Tree, tmp_path: Path, how: str, changes: Tree
) -> None:
    tree = first
    if changes:
        tree = with_changes(two_languages(tmp_path), changes)
        run(pools, tree, 1)
    base = stage1_of(tree) if how == "run" else str(imported(tree, tmp_path, "stage1"))
    review = review_of(tree, base, output_dir=str(tmp_path / "runs"))
    contexts = [RunContext(parse_run(tree, "x")), run(pools, review, 1)]
    assert contexts[0].plan == contexts[1].plan
    models = [Model.of(context) for context in contexts]
    assert same(*(dict(model.module.state_dict()) for model in models))
    whole, alone = (read_json(context.folder / "evaluation.json")["sets"] for context in contexts)
    for name, found in whole.items():
        bits = found["bits_by_document"]
        assert alone[name]["bits_by_document"] == {"base": bits["stage1"], "stage2": bits["stage2"]}


def test_it_is_spread_over_ranks_watched_exported_and_reviewed_again(
    pools: Pools, first: Tree, tmp_path: Path
) -> None:
    changes: Tree = {"output_dir": str(tmp_path / "runs"), "validate": {"every_tokens": 768}}
    spread = review_of(first, stage1_of(first), parallel={"ranks": 2, "ep_size": 2}, **changes)
    context = run(pools, spread, 2)
    whole, alone = (
        read_json(folder / "evaluation.json")["sets"]
        for folder in (RunContext(parse_run(first, "x")).folder, context.folder)
    )
    for name, found in whole.items():
        bits = found["bits_per_character"]
        assert alone[name]["bits_per_character"] == pytest.approx(
            {"base": bits["stage1"], "stage2": bits["stage2"]}, rel=1e-5
        )
    watched = read_json(context.folder / VALIDATION_BASE_FILE)["sets"]
    assert watched.keys() == {"en"}  # forgetting is measured against the model that it started from
    assert main(["report", str(context.folder.run_file)]) == 0
    page = (context.folder / "report.html").read_text(encoding="utf-8")
    assert "This run has no stage 1: stage1 is not in its run.yaml." in page and "no stage 2" not in page
    again = review_of(first, str(imported(spread, tmp_path)), name="again", **changes)
    last = read_json(run(pools, again, 1).folder / "evaluation.json")["sets"]["el"]
    assert last["bits_per_character"]["base"] == pytest.approx(alone["el"]["bits_per_character"]["stage2"], rel=1e-5)


def test_its_jobs_and_its_estimate_are_of_stage_2_alone(first: Tree) -> None:
    review = parse_run(review_of(first, str(RunContext(parse_run(first, "x")).run.folder)), "x")
    assert [job.name for job in jobs_of(review)] == ["tokenize", "prepare", "stage2", "evaluate"]
    estimate = Estimate(review, 2, Device(), ep_size=2)
    assert [stage.number for stage in estimate.stages] == [2] and "stage 1" not in estimate.text(None)
    assert estimate.dims == ParallelDims(2, 2) and "the base's plan" in estimate.text(None)
    assert PreparationConfig.model_validate(review.model_dump(mode="json", by_alias=True)).stage1_tokens is None


@pytest.mark.parametrize(("changes", "words"), [
    ({"base": None, "model": {"path": "x"}}, "experts.allocation: keep reviews a base's experts, but the run has no"),
    ({"stage1": {"tokens": 1024, "sequence_length": 32, "global_batch_size": 8, "lr": 0.01}}, "stage1: given, but"),
    ({"stage2": None}, "stage2: missing, and with experts.allocation keep it is the only stage; add it"),
    ({"experts": {"allocation": "keep", "num_new": 4}}, "allocation: keep takes the base's experts as they are"),
    ({"experts": {"allocation": "keep", "classifier_layers": 1}}, "leave classifier_layers out"),
    ({"experts": {"allocation": "uniform", "num_new": 4}}, "stage1: missing; add it"),
    ({"data": {"replay": {"share": 0.1}}}, "data.replay.share: a share of stage 1's tokens, but the run"),
])  # fmt: skip
def test_settings_that_do_not_fit_a_review_are_one_line(first: Tree, changes: Tree, words: str) -> None:
    base = str(RunContext(parse_run(first, "x")).run.folder)
    tree = review_of(first, base)
    tree |= {key: {**tree[key], **value} if key == "data" else value for key, value in changes.items()}
    with pytest.raises(UserError, match=words) as caught:
        parse_run(tree, "x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("old", "new", "words"), [
    (["en"], ["tr"], "data.new: tr is not one of those that the base learned last, el, hu, which experts.alloc"),
    (["en", "el"], ["hu"], "data.old: el is one of those that the base learned last; name it under new"),
])  # fmt: skip
def test_languages_that_do_not_fit_a_review_are_one_line(
    first: Tree, tmp_path: Path, old: list[str], new: list[str], words: str
) -> None:
    sets = tree_of(tmp_path, 2)["data"]
    known = {**sets["old"], **sets["new"]}
    data = {**first["data"], "old": {f"{name}-o": known[name] | {"language": name} for name in old}}
    data["new"] = {name: known[name] for name in new}
    run_ = parse_run(review_of(first, str(RunContext(parse_run(first, "x")).run.folder), data=data), "x")
    with pytest.raises(UserError, match=words) as caught:
        Estimate(run_, 1, Device())
    assert "\n" not in str(caught.value)
