"""Curves of a stage that resumes from an earlier checkpoint. Run: pytest tests/launch/test_curves.py"""

import json
import shutil
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers.tiny import write_run
from tests.launch.test_commands import command

STEPS = [8, 16, 24, 32, 40, 48]  # in samples


@pytest.mark.slow
def test_a_stage_that_goes_on_keeps_its_wandb_run_and_repeats_no_step(tmp_path: Path) -> None:
    path = write_run(
        tmp_path,
        prepared=True,
        log={"tensorboard": True, "wandb": True},
        checkpoint={"every_steps": 4, "every_minutes": None},
    )
    train = (sys.executable, "-m", "pipeline", "run", str(path), "--until", "stage1")
    command(*train, WANDB_MODE="offline")
    folder = tmp_path / "runs" / "tiny"
    # As after a crash in step 7: its last checkpoint is that of step 4, its curves reach step 6.
    (folder / "manifests" / "stage1.json").unlink()
    shutil.rmtree(folder / "stage1" / "step000006")
    output = command(*train, WANDB_MODE="offline")
    assert "after 4 steps" in output

    rows = [json.loads(line) for line in (folder / "stage1" / "metrics.jsonl").read_text().splitlines()]
    assert [row["samples"] for row in rows] == STEPS
    events = EventAccumulator(str(folder / "tensorboard" / "stage1"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/next_token")] == STEPS
    names = {path.name.rsplit("-", 1)[1] for path in (folder / "wandb").glob("offline-run-*")}
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 2
    assert names == {(folder / "stage1" / "wandb_id").read_text()}
