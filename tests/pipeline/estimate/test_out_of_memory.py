"""What a full GPU leads to. Run: pytest tests/pipeline/estimate/test_out_of_memory.py"""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline.cli import main
from pipeline.distributed import process_group
from pipeline.distributed.process_group import Ranks
from pipeline.run import runner
from tests.helpers.tiny import prepared_run, run_tree


def test_it_is_one_line_that_says_what_was_expected_and_what_lowers_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    changes = {"parallel": {"micro_batch_size": 4}}
    prepared_run(tmp_path, **changes)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_tree(tmp_path, **changes)))
    monkeypatch.setattr(runner, "train_steps", full)
    monkeypatch.setattr(process_group, "_joined", Ranks(0, 1, torch.device("cpu")))
    monkeypatch.setattr(process_group, "leave", lambda: None)
    monkeypatch.setattr("sys.argv", ["pipeline", "train", str(path), "--stage", "1"])
    assert main.command_line() == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert lines[0].startswith("error: stage 1: out of memory on ")
    assert " GB were allocated, " in lines[0] and " GB estimated; " in lines[0]
    assert "parallel.micro_batch_size below 4" in lines[0] and "stage1.activation_checkpointing: true" in lines[0]
