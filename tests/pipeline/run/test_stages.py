"""What a stage says where it fails. Run: pytest tests/pipeline/run/test_stages.py"""

from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import OwnError
from pipeline.distributed.process_group import Ranks
from pipeline.run.context import RunContext
from pipeline.run.stages import train
from pipeline.training import train as training
from tests.helpers.tiny import parse_run, prepared_run, run_tree


def test_out_of_memory_says_what_was_expected_and_what_lowers_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    changes = {"parallel": {"micro_batch_size": 4}}
    prepared_run(tmp_path, **changes)
    monkeypatch.setattr(training, "train_stage", full)
    with pytest.raises(OwnError) as error:
        train(RunContext(parse_run(run_tree(tmp_path, **changes), "x")), Ranks(0, 1, torch.device("cpu")), 1)
    line = str(error.value)
    assert line.startswith("stage 1: out of memory on ")
    assert " GB were allocated, " in line and " GB estimated; " in line and "\n" not in line
    assert "parallel.micro_batch_size below 4" in line and "stage1.activation_checkpointing: true" in line
