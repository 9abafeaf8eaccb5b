"""What a sweep does with runs that fail, stop or are done, and what it submits.

Run: pytest tests/pipeline/sweep/test_sweep.py
"""

import os
import shlex
from pathlib import Path

import pytest
import yaml

from common.errors import UserError
from pipeline.config.run import RunConfig
from pipeline.records.run_folder import RunFolder
from pipeline.records.shared_stage import SharedStage
from pipeline.run.context import RunContext
from pipeline.sweep.config import Sweep, read_sweep
from pipeline.sweep.sweep import do_sweep, is_finished, show_sweep, submit_sweep
from tests.helpers.tiny import do_steps, write_run


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    """Three runs of which nothing is done."""
    base = write_run(tmp_path)
    path = tmp_path / "rates.yaml"
    runs = {"low": {"stage1.lr": 1e-3}, "middle": {"stage1.lr": 3e-3}, "high": {"stage1.lr": 1e-2}}
    path.write_text(yaml.safe_dump({"base": str(base), "runs": runs}, sort_keys=False))
    return read_sweep(path)


def test_a_run_that_fails_does_not_keep_others_from_being_done_and_is_named_at_the_end(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = []

    def do(run: RunConfig) -> None:
        tried.append(run.name)
        if run.name.endswith("low"):
            raise UserError("stage1: no space left")
        raise SystemExit(1)

    with pytest.raises(UserError, match=r"^rates: 3 of 3 runs not finished: tiny-low, tiny-middle, tiny-high; "):
        do_sweep(sweep, do)
    assert tried == ["tiny-low", "tiny-middle", "tiny-high"]
    assert "error: stage1: no space left" in capsys.readouterr().err
    assert not sweep.comparison.exists()


@pytest.mark.parametrize("code", [0, 130, 143])
def test_a_signal_that_ended_a_run_ends_the_sweep(sweep: Sweep, code: int) -> None:
    tried = []

    def do(run: RunConfig) -> None:
        tried.append(run.name)
        raise SystemExit(code)

    with pytest.raises(SystemExit):
        do_sweep(sweep, do)
    assert tried == ["tiny-low"]


def test_variables_that_a_run_sets_are_gone_when_the_next_one_begins(sweep: Sweep) -> None:
    seen: list[str | None] = []

    def do(run: RunConfig) -> None:
        seen.append(os.environ.get("OF_A_RUN"))
        os.environ["OF_A_RUN"] = run.name

    with pytest.raises(UserError):
        do_sweep(sweep, do)
    assert seen == [None, None, None]


def test_a_dry_run_lists_runs_and_writes_nothing(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    show_sweep(sweep)
    assert capsys.readouterr().out.splitlines() == [f"tiny-{name}: to do" for name in ("low", "middle", "high")]
    assert not any(is_finished(run) for run in sweep.runs)
    assert not sweep.base.output_dir.exists()


def shown_jobs(output: str) -> list[list[str]]:
    """For each job that a dry run shows, sbatch's options and the script."""
    return [shlex.split(line)[3:] for line in output.splitlines() if line.startswith("--- ")]


def test_each_run_is_a_chain_of_jobs_whose_first_waits_until_the_run_before_has_prepared(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    submit_sweep(sweep, dry_run=True)
    words = shown_jobs(capsys.readouterr().out)
    first = [found for found in words if found[-1].endswith("/tokenize.sh")]
    assert len(words) == 15
    assert first[0][:-1] == []
    kill = "--kill-on-invalid-dep=yes"
    assert first[1][:-1] == ["--dependency=afterany:JOB_OF_prepare_OF_tiny-low", kill]
    assert first[2][:-1] == ["--dependency=afterany:JOB_OF_prepare_OF_tiny-middle", kill]
    others = [found for found in words if found not in first]
    assert all(found[0].startswith("--dependency=afterok:") for found in others)
    assert not sweep.base.output_dir.exists()


def test_a_baseline_has_jobs_of_its_steps_alone_and_the_next_run_waits_for_its_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "methods.yaml"
    runs = {"full": {"method": "full"}, "moe": {}}
    path.write_text(yaml.safe_dump({"base": str(write_run(tmp_path)), "runs": runs}, sort_keys=False))
    submit_sweep(read_sweep(path), dry_run=True)
    words = shown_jobs(capsys.readouterr().out)
    names = [Path(found[-1]).stem for found in words]
    assert names == ["tokenize", "stage1", "evaluate", "tokenize", "prepare", "stage1", "stage2", "evaluate"]
    assert [found[0].removeprefix("--dependency=") for found in words[1:4]] == [
        "afterok:JOB_OF_tokenize", "afterok:JOB_OF_stage1", "afterany:JOB_OF_tokenize_OF_tiny-full",
    ]  # fmt: skip


def save_reviews(folder: Path) -> Path:
    """A sweep of which the first three runs train one stage 1, and the last another."""
    path = folder / "reviews.yaml"
    runs = {"lpr": {}, "none": {"stage2.lpr_weight": 0}, "plain": {"experts.classifier_layers": []},
            "fast": {"stage1.lr": 2e-2}}  # fmt: skip
    path.write_text(yaml.safe_dump({"base": str(write_run(folder)), "runs": runs}, sort_keys=False))
    return path


def test_runs_whose_stage_1_is_the_same_name_the_first_of_them_as_its_trainer(tmp_path: Path) -> None:
    sweep = read_sweep(save_reviews(tmp_path))
    with pytest.raises(UserError):
        do_sweep(sweep, lambda run: None)
    named = {run.name: SharedStage.load_if_there(run.folder / "shared_stage.json") for run in sweep.runs}
    by_first = SharedStage(trained_by=str(tmp_path / "runs" / "tiny-lpr"))
    assert named == {"tiny-lpr": None, "tiny-none": by_first, "tiny-plain": by_first, "tiny-fast": None}


def test_runs_whose_stage_1_is_the_same_wait_for_the_job_that_trains_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submit_sweep(read_sweep(save_reviews(tmp_path)), dry_run=True)
    words = shown_jobs(capsys.readouterr().out)
    waits = [found[0].removeprefix("--dependency=") for found in words if found[-1].endswith("/tokenize.sh")]
    trained = "afterany:JOB_OF_stage1_OF_tiny-lpr"
    assert waits[1:] == [trained, trained, "afterany:JOB_OF_prepare_OF_tiny-lpr"]


def test_stage_1_waits_for_the_run_that_trains_it_where_all_is_prepared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_reviews(tmp_path)
    for run in read_sweep(path).runs[:2]:
        RunFolder.create(run)
        do_steps(RunContext(run, quiet=True), "tokenize", "similarity", "allocate", "upcycle")
    capsys.readouterr()
    submit_sweep(read_sweep(path), dry_run=True)
    words = shown_jobs(capsys.readouterr().out)
    options = {Path(script).parents[1].name: first for *first, script in words if script.endswith("/stage1.sh")}
    assert options["tiny-lpr"] == []
    assert options["tiny-none"][0] == "--dependency=afterany:JOB_OF_stage1_OF_tiny-lpr"


def test_what_was_fetched_for_the_base_is_fetched_for_its_runs(sweep: Sweep) -> None:
    sweep.base.folder.mkdir(parents=True)
    (sweep.base.folder / "fetched.json").write_text('{"models": {}, "datasets": {}}')
    with pytest.raises(UserError):
        do_sweep(sweep, lambda run: None)
    assert (sweep.runs[0].folder / "fetched.json").read_text() == '{"models": {}, "datasets": {}}'
