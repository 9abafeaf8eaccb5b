"""A sweep of two runs on two ranks each, killed once. Run: pytest -m slow tests/faults/test_sweep.py"""

import json
import signal
from pathlib import Path

import pytest
import yaml

from pipeline.records.comparison import Comparison
from tests.faults.processes import Launch, wait_for
from tests.helpers.tiny import write_run


def save_sweep(folder: Path) -> Path:
    """Two learning rates; stage 1 is long enough to be killed in."""
    base = write_run(
        folder,
        parallel={"ranks": 2, "ep_size": 2},
        stage1={"tokens": 30 * 8 * 32},
        checkpoint={"every_steps": 1, "every_minutes": None},
    )
    path = folder / "rates.yaml"
    runs = {"low": {"stage1.lr": 1e-3}, "high": {"stage1.lr": 1e-2}}
    path.write_text(yaml.safe_dump({"base": str(base), "runs": runs}, sort_keys=False), encoding="utf-8")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_a_sweep_that_is_interrupted_resumes_skips_what_is_done_and_compares(
    tmp_path: Path, launches: list[Launch], number: signal.Signals
) -> None:
    path, runs = save_sweep(tmp_path), tmp_path / "runs"
    launches.append(Launch(["sweep", str(path)], tmp_path / "first.log"))
    wait_for(lambda: "stage 1: saved step" in launches[0].log.read_text(), launches[0], 280)
    launches[0].process.send_signal(number)
    launches[0].wait(90)
    launches[0].wait_until_gone(90)
    first = launches[0].log.read_text()
    if number == signal.SIGTERM:
        assert "stopped by SIGTERM; the same command resumes from there" in first
    assert not (runs / "tiny-low" / "manifests" / "stage1.json").is_file()
    assert not (runs / "tiny-high").exists()

    launches.append(Launch(["sweep", str(path)], tmp_path / "second.log"))
    assert launches[1].wait(280) == 0, launches[1].log.read_text()
    second = launches[1].log.read_text()
    low, high = second.split("sweep: tiny-high, 2 of 2")
    assert "resumed" in low and "resumed" not in high
    # What the first run left in the cache: text, similarity and upcycled weights.
    assert "tokens: en, el, hu: there already, skipped" in high
    assert high.count("is there already, skipped") == 2
    rows = (runs / "tiny-low" / "stage1" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(1, 31))
    found = Comparison.load(runs / "compare-rates" / "compare.json")
    assert [(one.name, one.group) for one in found.runs] == [("tiny-low", "tiny-low"), ("tiny-high", "tiny-high")]
    assert all(one.flops and one.tokens == {"stage1": 7680, "stage2": 1536} for one in found.runs)
    assert (runs / "compare-rates" / "compare.html").is_file()

    launches.append(Launch(["sweep", str(path)], tmp_path / "third.log"))
    assert launches[2].wait(120) == 0
    third = launches[2].log.read_text()
    assert "sweep: tiny-low, 1 of 2: done, skipped" in third and "sweep: tiny-high, 2 of 2: done, skipped" in third
    assert "stage 1:" not in third
