"""Whole runs of the baselines by the command line, and their comparison. Run: pytest tests/launch/test_baselines.py"""

import sys
from pathlib import Path

import pytest

from tests.helpers.tiny import write_run
from tests.launch.test_commands import command

METHODS = {"full": "full", "lora": "{name: lora, rank: 4}", "llama_pro": "{name: llama_pro, blocks: 2}"}


@pytest.mark.slow  # tests/distributed/test_baseline_runs.py does such runs within a process
def test_each_method_runs_to_its_report_and_they_are_compared(tmp_path: Path) -> None:
    path, words = write_run(tmp_path, parallel={"ranks": 2}), (sys.executable, "-m", "pipeline")
    for name, method in METHODS.items():
        run = (*words, "run", str(path), "--set", f"name={name}", "--set", f"method={method}")
        output = command(*run)
        for step in ("similarity", "allocate", "upcycle"):
            assert f"{step}: method {name} has no experts, skipped" in output
        assert f"stage2: method {name} has no routers to review, skipped" in output
        assert "stopped before its end" not in output
        assert "stage 1: 6 steps of 8 x 32 tokens on 2 ranks (ep_size 1" in output
        assert ("tokens: en, el, hu: there already, skipped" in output) == (name != "full")
        for heading in ("bits/char, lower is better", "NEW   el", "OLD   en", "base   stage1 ", "report: "):
            assert heading in output
        assert (tmp_path / "runs" / name / "report.html").is_file()
    again = command(*run)
    assert all(f"{step}: done, skipped" in again for step in ("tokenize", "stage1", "evaluate"))
    folders = [str(tmp_path / "runs" / name) for name in METHODS]
    table = command(*words, "compare", *folders, "--against", folders[0])
    assert "Bits against full, in percent" in table and "llama_pro" in table
