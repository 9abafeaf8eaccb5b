"""Tiny runs on the cluster, and what is read of them."""

import json
import shutil
from pathlib import Path
from typing import Any

from tests.cluster.cluster import Cluster
from tests.helpers.tiny import write_run

PIPELINE = ("python", "-m", "pipeline")


def write_cluster_run(folder: Path, *, prepared: bool = False, **changes: Any) -> Path:
    """A tiny run's YAML for two ranks, all its steps still to do, or done up to upcycling."""
    settings = {"parallel": {"ranks": 2, "ep_size": 2}, "log": {"ranks": True, "tensorboard": False}} | changes
    settings["cluster"] = {"environment": {"OMP_NUM_THREADS": 1}, **settings.get("cluster", {})}
    return write_run(folder, prepared=prepared, **settings)


def copy_run(folder: Path, name: str) -> list[str]:
    """Another run with the same steps done; the options that name it."""
    shutil.copytree(folder / "runs", folder / name, symlinks=True)
    return ["--set", f"output_dir={folder / name}"]


def losses(stage: Path) -> list[float]:
    """The next-token loss of each step."""
    rows = metrics(stage)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"]["next_token"] for row in rows]


def metrics(stage: Path) -> list[dict[str, Any]]:
    """The complete rows of a stage's metrics."""
    path = stage / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.is_file() else []


def rank_rows(stage: Path) -> list[list[dict[str, Any]]]:
    """For each rank, the lines of its log."""
    paths = sorted((stage / "ranks").glob("rank*.jsonl"))
    return [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]


def samples_of_ranks(stage: Path) -> list[list[int]]:
    """For each rank, the samples that it computed."""
    return [
        [number for row in rows if "step" in row for number in range(row["first"], row["first"] + row["size"])]
        for rows in rank_rows(stage)
    ]


def status(cluster: Cluster, path: Path) -> dict[str, list[str]]:
    """For each step, the words that `python -m pipeline status` prints."""
    lines = cluster.run(*PIPELINE, "status", str(path)).splitlines()
    heading = next(index for index, line in enumerate(lines) if line.startswith("step "))
    return {line.split()[0]: line.split()[1:] for line in lines[heading + 1 :] if line.strip()}
