"""Plans of several budgets, and similarities that are given. Run: pytest tests/pipeline/run/test_budgets.py"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from pipeline.cli.main import main
from pipeline.estimate.device import Device
from pipeline.estimate.report import Estimate
from pipeline.method.allocation import allocate, most_similar_layers
from pipeline.model.backbone import parameter_counts
from pipeline.model.expert_plan import ExpertPlan
from pipeline.run.budgets import budgets_table
from pipeline.run.context import RunContext
from tests.helpers.tiny import do_steps, parse_run, run_tree, write_run

BY_LAYER = [0.1, 0.2, 0.8, 0.4]


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """A file of similarities of four layers."""
    path = tmp_path / "given.json"
    tree = {"old": ["en"], "new": ["el", "hu"], "tokens": {}, "pairs": {}, "by_layer": BY_LAYER}
    path.write_text(json.dumps(tree))
    return path


def with_budget(folder: Path, given: Path | None, **experts: Any) -> RunContext:
    """A run that allocates by similarities: those of a file, or its own."""
    tree = run_tree(folder) | {"experts": {"num_new": 6, "rounding": "largest_remainder", **experts}}
    if given is not None:
        tree["experts"]["similarity"] = str(given)
    return RunContext(parse_run(tree, "tiny.yaml"), quiet=True)


def cells(table: str) -> dict[str, list[str]]:
    """By the beginning of a row, its last two cells."""
    return {re.split(r"\s{2,}", line)[0]: line.split()[-2:] for line in table.splitlines()}


def test_each_budget_has_the_plan_parameters_and_memory_that_a_run_of_it_would_have(
    tmp_path: Path, given: Path
) -> None:
    context = with_budget(tmp_path, given, classifier_layers=1)
    table = budgets_table(context, "4,9", ranks=2, ep_size=2, device="80GB")
    rows = cells(table)
    for column, budget in enumerate((4, 9)):
        experts = context.run.experts.model_copy(update={"num_new": budget})
        counts = allocate(experts, 4, BY_LAYER).counts
        shown = [rows[f"layer {layer}"][column] for layer in range(4)]
        assert [int(cell.removesuffix("c")) for cell in shown] == counts
        marked = [layer for layer, cell in enumerate(shown) if cell.endswith("c")]
        assert marked == most_similar_layers(BY_LAYER, counts, 1)
        run = context.run.model_copy(update={"experts": experts})
        estimate = Estimate(run, 2, Device.named("80GB"), ep_size=2)  # its plan is by the given similarities too
        assert list(estimate.plan.counts) == counts
        numbers = parameter_counts(estimate.sizes.total, estimate.sizes.mlp, estimate.sizes.hidden, estimate.plan)
        assert rows["parameters, M"][column] == f"{numbers['total'] / 1e6:,.1f}"
        assert rows["active per token, M"][column] == f"{numbers['active'] / 1e6:,.1f}"
        for stage in estimate.stages:
            peak = estimate.memory(stage)["peak"]
            assert float(rows[f"stage {stage.number}, GB of the fullest rank"][column]) == pytest.approx(
                peak / 1e9, abs=0.006
            )
    assert rows["new experts"] == ["4", "9"]


def test_it_writes_nothing(tmp_path: Path, given: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experts = {"allocation": "layerwise", "counts": None, "num_new": 6, "classifier_layers": 0}
    experts["similarity"] = str(given)
    path = write_run(tmp_path, experts=experts)
    before = sorted(tmp_path.rglob("*"))
    assert main(["allocate", str(path), "--budgets", "4,12"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    assert "1 rank on cpu; nothing was written" in capsys.readouterr().out


def test_similarities_that_are_given_are_not_measured_and_become_the_runs(
    tmp_path: Path, given: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    context = do_steps(with_budget(tmp_path, given), "tokenize", "similarity", "allocate")
    assert not context.folder.has_manifest("similarity")
    plan = ExpertPlan.load(context.folder / "expert_plan.json")
    assert list(plan.similarity or []) == BY_LAYER
    assert list(plan.counts) == allocate(context.run.experts, 4, BY_LAYER).counts
    assert json.loads((context.folder / "similarity.json").read_text())["by_layer"] == BY_LAYER
    assert f"similarities of {given}, not measured" in capsys.readouterr().out


def test_going_back_to_measuring_takes_what_was_measured_and_asks_before_allocating_again(
    tmp_path: Path, given: Path
) -> None:
    own = do_steps(with_budget(tmp_path, None), "tokenize", "similarity", "allocate")
    measured = (own.folder / "similarity.json").read_text()
    plan = (own.folder / "expert_plan.json").read_text()
    with pytest.raises(UserError, match=r"allocate: done in .* experts\.similarity was null, is "):
        do_steps(with_budget(tmp_path, given), "allocate")
    forced = with_budget(tmp_path, given)
    do_steps(RunContext(forced.run, force=True, quiet=True), "allocate")
    assert (own.folder / "similarity.json").read_text() != measured
    do_steps(RunContext(own.run, force=True, quiet=True), "similarity", "allocate")
    assert (own.folder / "similarity.json").read_text() == measured
    assert (own.folder / "expert_plan.json").read_text() == plan


def test_a_run_without_old_text_can_allocate_by_given_similarities(tmp_path: Path, given: Path) -> None:
    tree = run_tree(tmp_path) | {"experts": {"num_new": 6, "similarity": str(given)}, "stage2": None}
    del tree["data"]["old"]
    context = do_steps(RunContext(parse_run(tree, "tiny.yaml"), quiet=True), "tokenize", "similarity", "allocate")
    assert list(context.plan.similarity or []) == BY_LAYER
