"""What befalls a job, for real; each ends with the losses of an undisturbed run. Run: pytest -m slow tests/cluster"""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.cluster import Cluster, wait_for
from tests.cluster.runs import PIPELINE, copy_run, losses, metrics, rank_rows, status, write_cluster_run

pytestmark = pytest.mark.slow
STEPS = 300  # some 20 seconds
SHORT = {"tokens": 8 * 32 * STEPS, "sequence_length": 32, "global_batch_size": 8}


class Interrupted:
    """A job of stage 1 that something befalls."""

    def __init__(self, cluster: Cluster, folder: Path, name: str, steps: int = STEPS, **cluster_section: Any) -> None:
        self.cluster, self.folder = cluster, folder / name / "tiny"
        copy_run(folder, name)
        tree = yaml.safe_load((folder / "run.yaml").read_text())
        tree["output_dir"] = str(folder / name)
        tree["stage1"]["tokens"] = 8 * 32 * steps
        section = {"signal_seconds": 1, "stage1": {"nodes": 2, "time": "10"}} | cluster_section
        tree["cluster"] = {**tree["cluster"], **section}
        self.path = folder / f"{name}.yaml"
        self.path.write_text(yaml.safe_dump(tree))
        text = cluster.run(*PIPELINE, "submit", str(self.path), "--until", "stage1")
        found = re.search(r"stage1: job ([\d ]+)", text)
        assert found, text
        self.jobs = found[1].split()

    @property
    def job(self) -> str:
        return self.jobs[0]

    @property
    def stage(self) -> Path:
        return self.folder / "stage1"

    def events(self) -> list[str]:
        """What the batch script has noted."""
        path = self.folder / "jobs" / "stage1.events"
        return path.read_text().splitlines() if path.is_file() else []

    def wait_for_step(self, step: int) -> None:
        wait_for(f"no step {step}: {self.log()}", lambda: len(metrics(self.stage)) >= step, 120)

    def wait_until_done(self, seconds: float = 400) -> None:
        wait_for("not done", lambda: self.events() and self.events()[-1].endswith(": done"), seconds)

    def log(self) -> str:
        path = self.folder / "jobs" / "stage1.log"
        return path.read_text() if path.is_file() else "no log"

    def check(self, expected: list[float], starts: int) -> None:
        """It went on at least so often, and ended as if nothing had been."""
        assert losses(self.stage) == expected
        assert sum("starts on" in line for line in self.events()) >= starts
        assert self.log().count("starts on") >= starts  # the log was appended to
        assert status(self.cluster, self.path)["stage1"][0] == "done"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run, done up to upcycling."""
    folder = tmp_path_factory.mktemp("faults")
    write_cluster_run(folder, prepared=True, stage1=SHORT, checkpoint={"every_steps": 50, "every_minutes": None})
    return folder


def undisturbed(cluster: Cluster, folder: Path, steps: int) -> list[float]:
    """The losses of a run that nothing befalls."""
    where = [*copy_run(folder, f"undisturbed{steps}"), "--set", f"stage1.tokens={8 * 32 * steps}"]
    cluster.run("srun", "-N2", "launch/train.sh", str(folder / "run.yaml"), "--stage", "1", *where, seconds=400)
    return losses(folder / f"undisturbed{steps}" / "tiny" / "stage1")


@pytest.fixture(scope="module")
def expected(_cluster: Cluster, folder: Path) -> list[float]:
    """The losses of an undisturbed run."""
    return undisturbed(_cluster, folder, STEPS)


def test_term_to_all_of_a_job(cluster: Cluster, folder: Path) -> None:
    expected = undisturbed(cluster, folder, 2 * STEPS)
    run = Interrupted(cluster, folder, "term", 2 * STEPS)
    run.wait_for_step(20)
    state, number, *words = status(cluster, run.path)["stage1"]
    assert (state, number) == ("running", run.job)
    assert re.match(r"step [\d,]+ of 600, [\d,]+ tokens/s, [\d:]+ left; limit in [\d:]+ /", " ".join(words))
    cluster.run("scancel", "--signal=TERM", "--full", run.job)
    run.wait_until_done()
    run.check(expected, starts=2)


def test_scontrol_requeue(cluster: Cluster, folder: Path, expected: list[float]) -> None:
    run = Interrupted(cluster, folder, "requeue")
    run.wait_for_step(20)
    cluster.run("scontrol", "requeue", run.job)
    run.wait_until_done()
    run.check(expected, starts=2)


def test_a_rank_killed(cluster: Cluster, folder: Path, expected: list[float]) -> None:
    run = Interrupted(cluster, folder, "rank")
    run.wait_for_step(70)
    process = rank_rows(run.stage)[1][0]["process"]
    cluster.run("ssh", "node2", f"kill -KILL {process}")
    run.wait_until_done()
    run.check(expected, starts=2)
    assert any(re.search(r"stopped before its end \(exit code 1(37|43)\)", line) for line in run.events())


def test_preemption_by_a_higher_partition(cluster: Cluster, folder: Path, expected: list[float]) -> None:
    run = Interrupted(cluster, folder, "preempted")
    run.wait_for_step(20)
    cluster.run("srun", "--partition=high", "--nodes=2", "--exclusive", "sleep", "5")
    run.wait_until_done()
    run.check(expected, starts=2)


def test_a_node_killed(cluster: Cluster, folder: Path, expected: list[float]) -> None:
    run = Interrupted(cluster, folder, "node")
    run.wait_for_step(70)
    cluster.kill_node("node2")
    try:
        wait_for("not queued again", lambda: "PD" in cluster.run("squeue", "-h", "-o", "%t"), 90)
    finally:
        cluster.start_node("node2")
    run.wait_until_done()
    run.check(expected, starts=2)


def test_usr1_before_the_time_limit(cluster: Cluster, folder: Path) -> None:
    # Long enough that it isn't done when SLURM, which looks twice a minute, sends the signal.
    expected = undisturbed(cluster, folder, 3 * STEPS)
    jobs = {"nodes": 2, "time": "2"}
    run = Interrupted(cluster, folder, "usr1", 3 * STEPS, signal_seconds=60, max_restarts=30, stage1=jobs)
    run.wait_until_done(1200)
    run.check(expected, starts=2)
    assert any("USR1 came" in line for line in run.events())


def test_a_time_limit_that_runs_out(cluster: Cluster, folder: Path, expected: list[float]) -> None:
    # No signal comes before the limit, and a rank that hangs sees to it that the limit is reached.
    jobs = {"nodes": 2, "time": "1", "sbatch": ["--signal=B:CONT@1"]}
    run = Interrupted(cluster, folder, "limit", stage1=jobs)
    run.wait_for_step(70)
    process = rank_rows(run.stage)[1][0]["process"]
    cluster.run("ssh", "node2", f"kill -STOP {process}")
    run.wait_until_done()
    run.check(expected, starts=2)
    assert not any("USR1 came" in line for line in run.events())


def test_a_cancelled_job_stays_cancelled(cluster: Cluster, folder: Path) -> None:
    run = Interrupted(cluster, folder, "cancelled")
    run.wait_for_step(20)
    cluster.run("scancel", run.job)
    cluster.wait_until_idle()
    state, *words = status(cluster, run.path)["stage1"]
    assert state == "cancelled", words
    assert "PD" not in cluster.run("squeue", "-h", "-o", "%t")


def test_where_requeue_is_forbidden_a_chain_goes_on(cluster: Cluster, folder: Path, expected: list[float]) -> None:
    run = Interrupted(cluster, folder, "chain", restart="chain", max_restarts=2)
    assert len(run.jobs) == 3
    run.wait_for_step(20)
    cluster.run("scancel", "--signal=USR1", "--batch", run.job)
    run.wait_until_done()
    run.check(expected, starts=2)
    cluster.wait_until_idle()
    wait_for("the third job is not taken back", lambda: not cluster.run("squeue", "-h").strip())


def test_at_the_restart_cap_the_job_fails_and_says_why(cluster: Cluster, folder: Path) -> None:
    run = Interrupted(cluster, folder, "cap", max_restarts=1)
    for start in (1, 2):
        wait_for("not started", lambda start=start: sum("starts on" in line for line in run.events()) == start)
        run.wait_for_step(20 * start)
        cluster.run("scancel", "--signal=USR1", "--batch", run.job)
    wait_for("not failed", lambda: status(cluster, run.path)["stage1"][0] == "failed")
    assert "failed: not done after 1 restarts (exit code 0 after USR1)" in run.events()[-1]
    assert "ExitCode=75:0" in cluster.run("scontrol", "-o", "show", "job", run.job)


def test_a_signal_after_the_end_spoils_nothing(cluster: Cluster, folder: Path, expected: list[float]) -> None:
    run = Interrupted(cluster, folder, "late")
    manifest = run.folder / "manifests" / "stage1.json"
    wait_for("not trained", manifest.is_file, 120)
    cluster.attempt("scancel", "--signal=TERM", "--full", run.job)
    run.wait_until_done()
    run.check(expected, starts=1)
    assert "COMPLETED" in cluster.run("scontrol", "-o", "show", "job", run.job)
