"""A sweep as chains of jobs on a real SLURM cluster. Run: pytest -m slow tests/cluster/test_sweep.py"""

import re
from pathlib import Path

import pytest
import yaml

from pipeline.records.comparison import Comparison
from tests.cluster.cluster import Cluster, wait_for
from tests.cluster.runs import PIPELINE, write_cluster_run


@pytest.mark.slow
def test_a_submitted_sweep_prepares_once_trains_each_run_and_is_compared_by_the_same_command(
    cluster: Cluster, tmp_path: Path
) -> None:
    base = write_cluster_run(tmp_path, cluster={"every_job": {"time": "10"}, "signal_seconds": 30})
    path, runs = tmp_path / "rates.yaml", tmp_path / "runs"
    changes = {"low": {"stage1.lr": 1e-3}, "high": {"stage1.lr": 1e-2}}
    path.write_text(yaml.safe_dump({"base": str(base), "runs": changes}, sort_keys=False), encoding="utf-8")
    words = (*PIPELINE, "sweep", str(path), "--submit")
    output = cluster.run(*words)
    low, high = (dict(re.findall(r"^(\w+): job (\d+) ", part, re.M)) for part in output.split("sweep: tiny-high\n"))
    assert len(low) == len(high) == 5
    assert f"Dependency=afterany:{low['prepare']}(" in cluster.run("scontrol", "-o", "show", "job", high["tokenize"])
    assert "sweep: 2 of 2 runs are left" in output
    for name in ("tiny-low", "tiny-high"):
        wait_for(f"{name} is not done", (runs / name / "report.html").is_file, 400)
    cluster.wait_until_idle()
    log = (runs / "tiny-high" / "jobs" / "prepare.log").read_text()
    assert log.count("is there already, skipped") == 2
    again = cluster.run(*words)
    assert again.count("done, not submitted") == 2
    assert [one.name for one in Comparison.load(runs / "compare-rates" / "compare.json").runs] == [
        "tiny-low",
        "tiny-high",
    ]
