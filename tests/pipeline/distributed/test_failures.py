"""What a rank that failed leaves behind. Run: pytest tests/pipeline/distributed/test_failures.py"""

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from pipeline.distributed.failures import is_lost_peer, keep_traceback, last_cause, record_collectives
from pipeline.distributed.process_group import time_limits

REMOTE = """NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited or there was a network error
ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.
Last error:
socketProgress: Connection closed by remote peer node2<41231>"""
MISTAKE = """NCCL error in: ProcessGroupNCCL.cpp:3356, invalid usage (run with NCCL_DEBUG=WARN for details)
ncclInvalidUsage: This usually reflects invalid usage of NCCL library.
Last error:
Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000"""
GLOO = "[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:41861: Connection reset by peer. Check the logs"


@pytest.mark.parametrize(
    ("text", "lost", "cause"),
    [
        (REMOTE, True, "socketProgress: Connection closed by remote peer node2<41231>"),
        (MISTAKE, False, "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000"),
        (GLOO, True, GLOO),
        ("shape mismatch", False, "shape mismatch"),
    ],
)
def test_not_every_error_of_nccl_is_a_lost_peer(text: str, lost: bool, cause: str) -> None:
    assert is_lost_peer(RuntimeError(text)) == lost
    assert last_cause(RuntimeError(text)) == cause


def test_the_whole_text_and_traceback_are_kept(tmp_path: Path) -> None:
    try:
        raise RuntimeError(MISTAKE)
    except RuntimeError as error:
        path = keep_traceback(tmp_path / "errors", 3, error)
    text = path.read_text()
    assert path.name == "rank00003.txt"
    assert MISTAKE in text and "test_the_whole_text_and_traceback_are_kept" in text


def test_nccl_is_to_write_its_last_collectives_into_the_run_s_folder(tmp_path: Path) -> None:
    environment = {"TORCH_FR_BUFFER_SIZE": "77"}
    record_collectives(tmp_path / "errors", environment)
    assert environment["TORCH_FR_BUFFER_SIZE"] == "77"
    assert environment["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert Path(environment["TORCH_FR_DUMP_TEMP_FILE"]).parent == tmp_path / "errors"
    assert (tmp_path / "errors").is_dir()


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_nccl_writes_down_its_collectives_before_the_watchdog_ends_the_rank_and_gloo_fails_after_it(
    backend: str,
) -> None:
    timeout, patience = time_limits(backend, 30)
    assert min(timeout, patience) == timedelta(minutes=30)
    assert (timeout < patience) == (backend == "nccl")
    assert abs(timeout - patience) >= timedelta(seconds=30)


PROGRAM = r"""
import os, sys
from pathlib import Path
from pipeline.distributed import failures, process_group
ranks = process_group.join()
with failures.told_by_ranks(Path(sys.argv[1])):
    raise RuntimeError("gloo said:\nConnection closed by peer")
"""


def test_a_lost_peer_is_one_line_and_its_own_exit_code(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 76, done.stderr
    file = tmp_path / "rank00000.txt"
    line = f"error: rank 0: lost the other ranks (Connection closed by peer); the whole text is in {file}"
    assert line in done.stderr.splitlines()
    assert "Traceback" not in done.stderr and "gloo said:" in file.read_text()
