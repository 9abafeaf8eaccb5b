"""A step depends on what it reads, and on nothing else. Run: pytest tests/pipeline/run/test_steps.py"""

from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.files import read_json
from pipeline.config.cluster import JOBS
from pipeline.records.step_manifest import FORMAT
from pipeline.run.context import RunContext
from pipeline.run.steps import STEPS, step_named
from tests.helpers.tiny import parse_run, prepared_run, run_tree


def outputs(folder: Path, **changes: Any) -> dict[str, Any]:
    """The keys of what a run's steps up to upcycling gave, and its similarities."""
    run = prepared_run(folder, distinct_experts=False, **changes)
    context = RunContext(run)
    found = {step: context.folder.manifest(step).outputs for step in ("tokenize", "similarity", "upcycle")}
    return found | {"languages": read_json(run.folder / "similarity.json")["new"]}


def test_copies_of_experts_are_written_when_they_are_asked_for_and_stay(tmp_path: Path) -> None:
    def written(**experts: Any) -> list[str]:
        context = RunContext(prepared_run(tmp_path, distinct_experts=False, experts=experts))
        assert context.folder.manifest("upcycle").outputs == first
        return [path.name for path in (context.upcycled / "upcycled").glob("layer_*")]

    first = RunContext(prepared_run(tmp_path, distinct_experts=False)).folder.manifest("upcycle").outputs
    assert written() == []
    assert len(written(write_copies=True)) == 6
    assert len(written()) == 6


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


def test_runs_of_several_seeds_share_text_and_similarities_where_the_text_has_a_seed_of_its_own(
    tmp_path: Path,
) -> None:
    first, other = (outputs(tmp_path, name=f"s{seed}", seed=seed, data={"seed": 17}) for seed in (17, 18))
    assert other["tokenize"] == first["tokenize"] == outputs(tmp_path, name="default", seed=17)["tokenize"]
    assert other["similarity"] == first["similarity"]
    assert other["upcycle"] != first["upcycle"]  # routers begin elsewhere
    assert outputs(tmp_path, name="text", seed=17, data={"seed": 18})["tokenize"] != first["tokenize"]


CHANGES = [
    {"seed": 18},
    {"stage1": {"lr": 1e-3}},
    {"stage1": {"balance_weight": 0.1}},
    {"data": {"temperature": 2.0}},
    {"data": {"isolate_documents": True}},
    {"bad_steps": {"norm_factor": 3.0}},
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_stage_depends_on_is_in_its_inputs(tmp_path: Path, change: dict[str, Any]) -> None:
    prepared_run(tmp_path, distinct_experts=False)
    stage1 = step_named("stage1").inputs

    def inputs(**changes: Any) -> dict[str, Any]:
        return stage1(RunContext(parse_run(run_tree(tmp_path, **changes), "x")))

    assert inputs(**change) != inputs()
    assert inputs(validate={"every_tokens": 64}, checkpoint={"keep": 5}, parallel={"ranks": 2}) == inputs()


def test_each_job_does_steps_and_each_step_has_a_job() -> None:
    assert list(dict.fromkeys(step.job for step in STEPS)) == list(JOBS)


def test_a_run_folder_of_an_earlier_version_is_named_in_one_line(tmp_path: Path) -> None:
    run = prepared_run(tmp_path, distinct_experts=False)
    manifest = run.folder / "manifests" / "tokenize.json"
    manifest.write_text(manifest.read_text().replace(f'"format": {FORMAT},\n', ""))
    with pytest.raises(UserError, match=r"runs/tiny: was made by an earlier version of this program \(format 1"):
        step_named("tokenize").is_done(RunContext(run))
