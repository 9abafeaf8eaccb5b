"""Where each rank ran and what it computed: with ``log.ranks``, STAGE/ranks/rank00000.jsonl.

One line per start: ``host``, ``process`` (its id), ``variables``. One line per micro-batch: ``step``, ``first`` and
``size``, the samples that it computed.
"""

import json
import os
import socket
from pathlib import Path
from typing import Any

from common.files import write_text
from common.launch_environment import RANK_VARIABLES
from pipeline.records.record import read_rows

PREFIXES = ("HF_", "OMP_", "NCCL_", "GLOO_", "CUDA_", "SLURM_JOB_ID", "SLURM_RESTART")


class RankLog:
    """One rank's lines; each step appears once, also after a resume from an earlier one.

    Args:
        folder: the stage's.
        rank: this rank.
        variables: names of the environment variables that the run sets; those that matter to every run are known.
        writes: whether ``log.ranks`` is on.
    """

    def __init__(self, folder: Path, rank: int, variables: list[str], *, writes: bool) -> None:
        self.path = folder / "ranks" / f"rank{rank:05d}.jsonl"
        self.variables, self.writes, self.is_open = {*variables, *RANK_VARIABLES}, writes, False

    def samples(self, step: int, first: int, size: int) -> None:
        """Record that ``step`` (from 1) takes the samples ``first`` to ``first + size - 1`` here."""
        if not self.writes:
            return
        if not self.is_open:
            self._begin(step)
        self._append({"step": step, "first": first, "size": size})

    def _begin(self, step: int) -> None:
        kept = [row for row in read_rows(self.path) if row.get("step", 0) < step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        variables = {name: os.environ[name] for name in sorted(os.environ) if self._matters(name)}
        self._append({"host": socket.gethostname(), "process": os.getpid(), "variables": variables})
        self.is_open = True

    def _matters(self, name: str) -> bool:
        return (name in self.variables or name.startswith(PREFIXES)) and "TOKEN" not in name

    def _append(self, row: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
