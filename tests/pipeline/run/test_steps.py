"""What is kept by content is found by content. Run: pytest tests/pipeline/run/test_steps.py"""

from pathlib import Path
from typing import Any

import pytest

from common.files import read_json
from pipeline.config.load import parse_run
from pipeline.run.rank_steps import RankSteps
from tests.helpers.tiny import prepared_run, run_tree


def outputs(folder: Path, **changes: Any) -> dict[str, Any]:
    """The keys of what a run's steps up to upcycling gave, and its similarities."""
    run = prepared_run(folder, distinct_experts=False, **changes)
    steps = RankSteps(run)
    found = {step: steps.folder.manifest(step)["outputs"] for step in ("tokenize", "similarity", "upcycle")}
    return found | {"languages": read_json(run.folder / "similarity.json")["new"]}


def test_a_change_redoes_what_depends_on_it_and_nothing_else(tmp_path: Path) -> None:
    first = outputs(tmp_path)
    assert first["languages"] == ["el", "hu"]
    assert outputs(tmp_path, name="lr", stage1={"lr": 1e-3}) == first

    fewer = run_tree(tmp_path)["data"]
    del fewer["new"]["hu"]
    one = outputs(tmp_path, name="fewer", data={"new": fewer["new"]})
    assert one["tokenize"] != first["tokenize"]
    assert one["similarity"] != first["similarity"]
    assert one["languages"] == ["el"]

    shorter = outputs(tmp_path, name="shorter", similarity={"tokens": 300})
    assert shorter["tokenize"] == first["tokenize"]
    assert shorter["similarity"] != first["similarity"]

    seeded = outputs(tmp_path, name="seeded", seed=18)
    assert seeded["upcycle"] != first["upcycle"]


@pytest.mark.parametrize("change", [{"seed": 18}, {"stage1": {"lr": 1e-3}}, {"stage1": {"balance_weight": 0.1}}])
def test_what_a_stage_depends_on_is_in_its_inputs(tmp_path: Path, change: dict[str, Any]) -> None:
    prepared_run(tmp_path, distinct_experts=False)
    inputs = RankSteps(parse_run(run_tree(tmp_path), "x")).stage_inputs(1)
    assert RankSteps(parse_run(run_tree(tmp_path, **change), "x")).stage_inputs(1) != inputs
    unrelated = {"validate": {"every_tokens": 64}, "checkpoint": {"keep": 5}, "parallel": {"ranks": 2}}
    assert RankSteps(parse_run(run_tree(tmp_path, **unrelated), "x")).stage_inputs(1) == inputs
