"""The whole run as a chain of jobs on a real SLURM cluster. Run: pytest tests/cluster/test_submit.py"""

import re
from pathlib import Path

from tests.cluster.cluster import Cluster, wait_for
from tests.cluster.runs import PIPELINE, metrics, status, write_cluster_run

JOBS = ["tokenize", "prepare", "stage1", "stage2", "evaluate"]
TWO_NODES = {
    "every_job": {"nodes": 2, "time": "10"},
    "tokenize": {"nodes": 2},
    "stage1": {"gpus_per_node": 1},
    "signal_seconds": 30,
}


def submitted(output: str) -> dict[str, str]:
    """The jobs' numbers, as submit prints them."""
    return dict(re.findall(r"^(\w+): job (\d+) ", output, re.M))


def test_submit_runs_the_whole_chain_and_status_tells_the_truth(cluster: Cluster, tmp_path: Path) -> None:
    path = write_cluster_run(tmp_path, cluster=TWO_NODES, data={"slice_bytes": 1024})
    folder = tmp_path / "runs" / "tiny"
    shown = cluster.run(*PIPELINE, "submit", str(path), "--dry-run")
    assert not (folder / "jobs").exists()
    jobs = submitted(cluster.run(*PIPELINE, "submit", str(path)))
    assert list(jobs) == JOBS
    for name in JOBS:
        assert (folder / "jobs" / f"{name}.sh").read_text() in shown
    waits = re.findall(r"^--- sbatch .*--dependency=afterok:JOB_OF_(\w+) .*/(\w+)\.sh$", shown, re.M)
    assert waits == list(zip(JOBS[:-1], JOBS[1:], strict=True))
    assert f"Dependency=afterok:{jobs['stage1']}(" in cluster.run("scontrol", "-o", "show", "job", jobs["stage2"])
    assert "TresPerNode=" not in cluster.run("scontrol", "-o", "show", "job", jobs["tokenize"])
    assert "TresPerNode=gres:gpu:1" in cluster.run("scontrol", "-o", "show", "job", jobs["stage1"])

    again = cluster.run(*PIPELINE, "submit", str(path))
    assert again.count("is submitted already, job") + again.count("done, not submitted") == 5
    running = ""
    while running != "evaluate":
        # A job is seen to run or done before its successor runs: none starts early.
        states = {name: row[0] for name, row in status(cluster, path).items()}
        assert list(states) == JOBS
        number = [states[name] == "done" for name in JOBS].index(False) if set(states.values()) != {"done"} else 5
        assert all(states[name] in ("waiting", "running", "done") for name in JOBS), states
        assert all(states[name] != "done" for name in JOBS[number:])
        assert all(states[name] == "waiting" for name in JOBS[number + 1 :]), states
        running = JOBS[min(number, 4)]
        # Asked once a job: asking takes the time of the machine that the job runs on.
        manifest = folder / "manifests" / f"{'upcycle' if running == 'prepare' else running}.json"
        wait_for(f"{running} is not done", manifest.is_file, 120)
    wait_for("not done", (folder / "report.html").is_file, 60)
    cluster.wait_until_idle()
    rows = status(cluster, path)
    assert {row[0] for row in rows.values()} == {"done"}
    assert rows["stage1"][1] == jobs["stage1"]
    assert "tokens/s," in rows["stage1"]
    assert rows["stage1"][-1] == str(folder / "jobs" / "stage1.log")
    tokenized = re.findall(r"(\d+) tasks done on (node\d), ", (folder / "jobs" / "tokenize.log").read_text())
    assert sorted(node for _, node in tokenized) == ["node1", "node2"]
    assert sum(int(number) for number, _ in tokenized) > 2
    assert [row["step"] for row in metrics(folder / "stage2")] == [1, 2, 3, 4, 5, 6]
    last = cluster.run(*PIPELINE, "submit", str(path))
    assert last.count("done, not submitted") == 5
    assert not submitted(last)


def test_a_step_that_fails_leaves_its_successors_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    path = write_cluster_run(tmp_path, cluster=TWO_NODES)
    with open(tmp_path / "text" / "en.jsonl", "a") as file:
        file.write("no JSON\n")
    jobs = submitted(cluster.run(*PIPELINE, "submit", str(path)))

    def ended() -> bool:
        return not cluster.run("squeue", "-h", "-o", "%i").strip()

    wait_for("successors wait for ever", ended, 90)
    rows = status(cluster, path)
    assert rows["tokenize"][0] == "failed"
    assert "en.jsonl" in " ".join(rows["tokenize"])
    for name in JOBS[1:]:
        assert " ".join(rows[name]).startswith(f"cancelled {jobs[name]} did not start, as tokenize failed")
    assert "ExitCode=2:0" in cluster.run("scontrol", "-o", "show", "job", jobs["tokenize"])
    assert "JobState=CANCELLED" in cluster.run("scontrol", "-o", "show", "job", jobs["evaluate"])


def test_a_run_that_asks_for_nothing_trains_on_its_ranks(cluster: Cluster, tmp_path: Path) -> None:
    """As launch/runs/quickstart.yaml: no cluster section, two ranks, ep_size 2."""
    path = write_cluster_run(tmp_path, prepared=True)
    cluster.run(*PIPELINE, "submit", str(path), "--until", "stage1")
    folder = tmp_path / "runs" / "tiny"
    wait_for("stage 1 is not done", (folder / "manifests" / "stage1.json").is_file, 120)
    assert "on 2 ranks (ep_size 2, " in (folder / "jobs" / "stage1.log").read_text()
