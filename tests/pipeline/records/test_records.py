"""What is written is read back by the same class. Run: pytest tests/pipeline/records"""

import math
from pathlib import Path

import pytest

from common.errors import UserError
from pipeline.records.metrics import Best, StepRow
from pipeline.records.run_folder import INPUTS_FILE, RunFolder
from pipeline.records.step_manifest import StepInputs, StepManifest


def row(step: int, loss: float = 1.5) -> StepRow:
    """A row of metrics."""
    return StepRow(
        step=step, samples=8 * step, tokens=64 * step, loss={"next_token": loss}, expert_0_share={"el": 0.5},
        load_imbalance=[1.0], lr=1e-3, grad_norm=0.5, skipped=None, tokens_per_second=10.0, memory_gb=1.0, seconds=2.0,
    )  # fmt: skip


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [row(1, 1 / 3), row(2, 1e-300)]
    for one in rows:
        one.append_to(path)
    assert StepRow.load_rows(path) == rows
    assert StepRow.load_rows(tmp_path / "absent.jsonl") == []


def test_a_loss_that_is_not_finite_survives(tmp_path: Path) -> None:
    for value in (math.nan, math.inf):
        row(1, value).append_to(tmp_path / "metrics.jsonl")
    read = [one.loss["next_token"] for one in StepRow.load_rows(tmp_path / "metrics.jsonl")]
    assert math.isnan(read[0]) and read[1] == math.inf


def test_rows_after_a_step_are_dropped_and_a_row_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(row(step).as_line() for step in range(1, 6)) + row(6).as_line()[:30], encoding="utf-8")
    assert StepRow.drop_rows_after(path, 3) == [row(1), row(2), row(3)]
    assert StepRow.load_rows(path) == [row(1), row(2), row(3)]


def test_a_row_of_another_version_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(row(1).as_line() + row(2).as_line().replace('"lr"', '"rate"'), encoding="utf-8")
    with pytest.raises(UserError, match=r"metrics\.jsonl, row 2: lr: Field required; another version"):
        StepRow.load_rows(path)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "best.json").write_text('{"tag": "step000001"')
    with pytest.raises(UserError, match=r"best\.json: can't be read as JSON"):
        Best.load(tmp_path / "best.json")


def inputs(**values: object) -> StepInputs:
    """What a step is done with."""
    return StepInputs(inputs=values, run={})


def test_what_a_step_has_left_stays_if_it_begins_again_with_the_same_inputs(tmp_path: Path) -> None:
    folder, left = RunFolder(tmp_path), tmp_path / "stage1" / "step000001"
    assert folder.inputs_of("stage1") is None
    for now, anew, stays in ((inputs(lr=1), False, True), (inputs(lr=2), False, False), (inputs(lr=1), True, False)):
        left.mkdir(parents=True, exist_ok=True)
        inputs(lr=1).save(tmp_path / "stage1" / INPUTS_FILE)
        assert folder.inputs_of("stage1") == inputs(lr=1)
        folder.make_room("stage1", now, anew=anew)
        assert left.is_dir() == stays
    folder.finish("stage1", inputs(lr=2), {}, {})
    assert folder.inputs_of("stage1") == inputs(lr=2)
    left.mkdir(parents=True)
    folder.make_room("stage1", inputs(lr=3), anew=False)
    assert not left.is_dir() and not folder.has_manifest("stage1")


def test_a_manifest_without_a_format_is_of_an_earlier_version(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "old")
    path = folder.manifest_path("tokenize")
    path.parent.mkdir(parents=True)
    path.write_text('{"step": "tokenize", "inputs": {}, "outputs": {}}')
    with pytest.raises(UserError, match=r"runs/old: was made by an earlier version of this program"):
        folder.manifest("tokenize")
    folder.finish("step", inputs(), {}, {})
    assert StepManifest.load(folder.manifest_path("step")).versions["python"]
