"""What submit --dry-run shows, without SLURM. Run: pytest tests/pipeline/cluster/test_submit.py"""

import shlex
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from pipeline.cli.arguments import parse
from pipeline.cluster.batch import job_of_options, settings_of_options
from pipeline.cluster.jobs import jobs_of
from pipeline.cluster.script import batch_script
from pipeline.cluster.submit import submit_run
from pipeline.config.load import load_run
from pipeline.run.context import RunContext
from tests.helpers.tiny import parse_run, run_tree

ROOT = Path(__file__).parents[3]


def dry_run(folder: Path, capsys: pytest.CaptureFixture[str], until: str, **cluster: Any) -> tuple[str, list[str]]:
    """All that is shown; the sbatch lines of it, each as its options and the name of its script."""
    context = RunContext(parse_run(run_tree(folder, cluster=cluster), "tiny.yaml"), quiet=True)
    submit_run(context, until=until, dry_run=True)
    shown = capsys.readouterr().out
    for job in jobs_of(context.run):
        assert (batch_script(job) in shown) or job.name == "evaluate"
    assert not (folder / "runs").exists()
    lines = [shlex.split(line)[1:] for line in shown.splitlines() if line.startswith("--- ")]
    assert all(words[:2] == ["sbatch", "--parsable"] for words in lines)
    return shown, [" ".join([*words[2:-1], Path(words[-1]).name]) for words in lines]


def test_a_dry_run_shows_each_script_after_its_sbatch_line_with_what_it_depends_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown, lines = dry_run(tmp_path, capsys, "evaluate")
    kill = "--kill-on-invalid-dep=yes"
    assert lines == [
        "tokenize.sh",
        f"--dependency=afterok:JOB_OF_tokenize {kill} prepare.sh",
        f"--dependency=afterok:JOB_OF_prepare {kill} stage1.sh",
        f"--dependency=afterok:JOB_OF_stage1 {kill} stage2.sh",
        f"--dependency=afterok:JOB_OF_stage2 {kill} evaluate.sh",
    ]
    assert shown.count("/stage1.sh\n#!/usr/bin/env bash\n") == 1


def test_sbatch_of_train_sh_trains_or_evaluates_as_a_job_is_done_when_one_step_is(tmp_path: Path) -> None:
    run = parse_run(run_tree(tmp_path), "tiny.yaml")
    assert job_of_options(run, parse(["train", "tiny.yaml"])).name == "stage2"
    baseline = parse_run({**run_tree(tmp_path), "method": "full"}, "tiny.yaml")
    assert job_of_options(baseline, parse(["train", "tiny.yaml"])).name == "stage1"
    with pytest.raises(UserError, match="^train --evaluate: no batch job does this alone; use "):
        job_of_options(run, parse(["train", "tiny.yaml", "--evaluate"]))


def test_sbatch_of_an_evaluation_with_tasks_is_done_when_the_tasks_are(tmp_path: Path) -> None:
    run = parse_run(run_tree(tmp_path), "tiny.yaml")
    for words, name in (([], "evaluate"), (["--tasks", "held_out"], "tasks")):
        options = parse(["evaluate", "tiny.yaml", *words])
        settings = settings_of_options(job_of_options(run, options), options)
        assert Path(settings["STEP_DONE"]) == tmp_path / "runs" / "tiny" / "manifests" / f"{name}.json"


def test_a_dry_run_shows_the_jobs_of_a_chain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, lines = dry_run(tmp_path, capsys, "stage2", restart="chain", max_restarts=1)
    kill = "--kill-on-invalid-dep=yes"
    assert lines[:4] == [
        "tokenize.sh",
        f"--dependency=afternotok:JOB_OF_tokenize {kill} tokenize.1.sh",
        f"--dependency=afterok:JOB_OF_tokenize?afterok:JOB_OF_tokenize.1 {kill} prepare.sh",
        f"--dependency=afternotok:JOB_OF_prepare {kill} prepare.1.sh",
    ]


@pytest.mark.parametrize(
    ("changes", "ranks"),
    [
        ([], {"tokenize": 1, "prepare": 1, "stage1": 2, "stage2": 2, "evaluate": 2}),
        (["cluster.every_job.nodes=2"], {"tokenize": 1, "prepare": 1, "stage1": 1, "stage2": 1, "evaluate": 1}),
        (["cluster.stage1.ranks_per_node=4"], {"stage1": 4, "stage2": 2}),
        (["cluster.stage1.gpus_per_node=8"], {"stage1": 8, "stage2": 2}),
    ],
)
def test_the_ranks_of_the_quickstart_are_spread_over_the_nodes_where_no_gpu_is_asked_for(
    changes: list[str], ranks: dict[str, int]
) -> None:
    run = load_run(ROOT / "launch" / "runs" / "quickstart.yaml", changes)
    found = {job.name: job.config.tasks_per_node for job in jobs_of(run)}
    assert {name: found[name] for name in ranks} == ranks
