"""A normal start prints our lines and no library's. Run: pytest tests/launch/test_quiet.py"""

import re
import sys
from pathlib import Path

import pytest

from tests.helpers.tiny import write_run
from tests.launch.test_commands import command

OURS = re.compile(
    r"(OLD|NEW) |(warning|tokens|allocate|upcycle|stage [12]|evaluate|report): |bits/char, | +chars |parameters |$"
    r"|[\w ]+: [\d,]+/[\d,]+ \w+, [\d,.]+/s, "  # the progress of any step
)


@pytest.mark.slow
def test_a_run_with_activation_checkpointing_on_two_ranks_prints_no_line_of_a_library(tmp_path: Path) -> None:
    path = write_run(
        tmp_path,
        parallel={"ranks": 2, "ep_size": 2},
        stage1={"activation_checkpointing": True},
        log={"tensorboard": True},
        deepspeed="ds_configs/bf16_zero1.json",
    )
    lines = command(sys.executable, "-m", "pipeline", "run", str(path)).splitlines()
    assert "stage 2: saved step000006" in "\n".join(lines)
    assert [line for line in lines if not OURS.match(line)] == []
    assert [line for line in lines if re.search("Warning|WARN|INFO|deprecat", line)] == []
