"""What a rank's failure leaves behind: its traceback in a file, one line with the cause, NCCL's last collectives."""

import os
import sys
import traceback
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path

from pipeline.distributed.watchdog import EXIT_STUCK

COLLECTIVES_KEPT = "2000"
# One of these is in the error of a collective whose other end is gone; "NCCL" alone stands in errors of any kind.
LOST_PEER = (
    "Connection closed", "Connection reset", "Connection refused", "Broken pipe", "timed out", "Timed out", "timeout",
    "remote process exited", "ncclRemoteError",
)  # fmt: skip


def record_collectives(folder: Path, environment: MutableMapping[str, str] = os.environ) -> None:
    """Have NCCL keep its last collectives, and write them to ``folder`` when one takes longer than it may.

    What the user has set stays. Read them with ``torchfrtrace``, which comes with torch.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment.setdefault("TORCH_FR_BUFFER_SIZE", COLLECTIVES_KEPT)
    environment.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    environment.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder / "collectives_rank"))


def has_joined() -> bool:
    """Whether this process is in a group of ranks; imports nothing that is not there."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_initialized()


@contextmanager
def told_by_ranks(folder: Path | None) -> Iterator[None]:
    """Of what a rank does: a collective that fails becomes one line with its cause; the whole text is kept.

    Args:
        folder: where ranks keep it; None where they have none.
    """
    try:
        yield
    except RuntimeError as error:
        if not has_joined():
            raise
        import torch

        rank = int(os.environ["RANK"])
        where = f"; the whole text is in {keep_traceback(folder, rank, error)}" if folder is not None else ""
        lost = is_lost_peer(error)
        if not lost and not isinstance(error, torch.distributed.DistError):
            raise
        what = f"lost the other ranks ({last_cause(error)})" if lost else last_cause(error)
        print(f"error: rank {rank}: {what}{where}", file=sys.stderr, flush=True)
        os._exit(EXIT_STUCK if lost else 1)  # the process group cannot be left in order


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone, rather than by a mistake of this one."""
    return any(words in str(error) for words in LOST_PEER)


def last_cause(error: BaseException) -> str:
    """The last line of an error's text that says something: NCCL and gloo name the cause there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def keep_traceback(folder: Path, rank: int, error: BaseException) -> Path:
    """Add the whole text and traceback to the rank's file; returns it."""
    path = folder / f"rank{rank:05d}.txt"
    folder.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(traceback.format_exception(error)) + "\n")
    return path
