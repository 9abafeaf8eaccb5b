"""The quickstart, whole, on the real model and text: 20 minutes, or hours where a CPU has no bf16.

Run: pytest -m slow tests/launch
"""

import json
from pathlib import Path

import pytest

from tests.launch.test_commands import command


@pytest.mark.slow
def test_the_quickstart_teaches_three_languages_and_keeps_english(tmp_path: Path) -> None:
    where = ["--set", f"output_dir={tmp_path}/runs", "--set", f"cache_dir={tmp_path}/cache"]
    output = command("bash", "launch/quickstart.sh", *where, seconds=12_000)
    folder = tmp_path / "runs" / "quickstart"
    evaluation = json.loads((folder / "evaluation.json").read_text())
    change = {name: entry["change"]["stage2"]["percent"] for name, entry in evaluation["sets"].items()}
    assert change["el"] <= -35
    assert change["hu"] <= -28
    assert change["tr"] <= -20
    assert change["en"] <= 0.5
    assert change["en-udhr"] <= 1.0
    assert all(change[f"{language}-udhr"] < 0 for language in ("el", "hu", "tr"))
    probability = [
        sum(layers := evaluation["routing"][stage]["sets"]["en"]["probability_0"]) / len(layers)
        for stage in ("stage1", "stage2")
    ]
    assert probability[1] >= probability[0] + 0.2
    steps = (folder / "stage2" / "metrics.jsonl").read_text().count("\n")
    assert steps == 80
    assert f"report: {folder}/report.html" in output
    again = command("bash", "launch/quickstart.sh", *where, seconds=120)
    assert again.count("done, skipped") == 7
