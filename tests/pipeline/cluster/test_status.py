"""What status says of a job that ends while it is asked, and of one that was done with other settings.

Run: pytest tests/pipeline/cluster/test_status.py
"""

from pathlib import Path

import pytest

from pipeline.cluster import slurm
from pipeline.cluster.jobs import jobs_of
from pipeline.cluster.status import run_status
from pipeline.cluster.submitted import write_submitted
from pipeline.records.run_folder import RunFolder
from pipeline.run.context import RunContext
from pipeline.run.runner import do_step
from pipeline.run.steps import step_named
from tests.helpers.tiny import parse_run, run_tree


def test_a_job_that_ends_after_slurm_was_asked_is_done_not_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = RunContext(parse_run(run_tree(tmp_path), "tiny.yaml"), quiet=True)
    RunFolder.create(context.run)
    tokenize = jobs_of(context.run)[0]
    write_submitted(context.run, {tokenize.name: ["7"]})
    tokenize.log.parent.mkdir(parents=True, exist_ok=True)
    tokenize.log.write_text("its output\n", encoding="utf-8")

    def ends_then_is_forgotten(numbers: list[str]) -> dict[str, slurm.JobState]:
        assert numbers == ["7"]
        do_step(context, step_named("tokenize"))
        return {}

    monkeypatch.setattr(slurm, "is_here", lambda: True)
    monkeypatch.setattr(slurm, "job_states", ends_then_is_forgotten)
    assert [row["state"] for row in run_status(context)] == ["done", "to do", "to do", "to do", "to do"]


def test_a_job_is_changed_only_from_the_step_on_that_was_done_with_other_inputs(tmp_path: Path) -> None:
    tree = run_tree(tmp_path)
    context = RunContext(parse_run(tree, "tiny.yaml"), quiet=True)
    RunFolder.create(context.run)
    for name in ("tokenize", "similarity", "allocate", "upcycle"):
        do_step(context, step_named(name))
    assert [row["state"] for row in run_status(context)] == ["done", "done", "to do", "to do", "to do"]
    more = context.run.model_copy(update={"experts": context.run.experts.model_copy(update={"num_new": 9})})
    rows = run_status(RunContext(more, quiet=True))
    assert [row["state"] for row in rows] == ["done", "changed", "to do", "to do", "to do"]
    assert "experts.num_new" in rows[1]["progress"]
