"""Saving and loading a checkpoint, against raw writes and reads of the same bytes by the same ranks.

deepspeed --num_gpus 2 --module benchmarks.checkpoint launch/runs/quickstart.yaml [--rounds 5] [--json FILE]

The run must be done up to upcycling. Nothing of it is changed: checkpoints go to a folder of their own.
"""

import argparse
import os
import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

from benchmarks.measuring import PeakMemory
from common.files import fsync_path, write_json
from common.text_table import aligned
from pipeline.config.load import load_run
from pipeline.distributed.process_group import Ranks, join, leave
from pipeline.estimate.divide import divide
from pipeline.method.stages import find_stage
from pipeline.records.step_manifest import StepInputs
from pipeline.run.context import RunContext
from pipeline.training.inputs import StageInputs
from pipeline.training.resume import resume, save
from pipeline.training.state import TrainingState
from pipeline.training.step import train_step
from pipeline.training.train import trained_parameters

AT_ONCE = 8 << 20  # bytes


def timed(ranks: Ranks, action: Callable[[], object]) -> float:
    """Seconds from when all ranks begin until all have ended."""
    ranks.wait()
    started = time.perf_counter()
    action()
    ranks.wait()
    return time.perf_counter() - started


def raw_write(folder: Path, rank: int, contents: list[bytes]) -> None:
    """The files that this rank saves, each written and synced; then the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(contents):
        view = memoryview(content)
        with open(folder / f"{rank}-{number}", "wb", buffering=0) as file:
            for start in range(0, len(view), AT_ONCE):
                file.write(view[start : start + AT_ONCE])
            os.fsync(file.fileno())
    fsync_path(folder)


def raw_read(folder: Path, rank: int) -> None:
    """Read this rank's raw files."""
    buffer = bytearray(AT_ONCE)
    for path in sorted(folder.glob(f"{rank}-*")):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache, so that they are read from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


class Benchmark:
    """Stage 1 after one step, and a folder for its checkpoints."""

    def __init__(self, run_file: str, ranks: Ranks) -> None:
        run = load_run(run_file, [])
        steps = RunContext(run)
        self.ranks, self.folder = ranks, run.folder / "benchmark"
        identity = steps.identity(1)
        stage = find_stage(run, 1)
        target, done_with = self.folder / "stage1", StepInputs(inputs={}, run={})
        dims = divide(run, ranks)
        inputs = StageInputs(run, stage, steps.plan, steps.store, steps.untrained, target, identity, done_with, dims)
        self.state = TrainingState.start(inputs, ranks)
        train_step(self.state)
        self.raw = self.folder / "raw"
        self.times: dict[str, list[float]] = {name: [] for name in ("save", "raw write", "load", "raw read")}
        self.peak = 0

    @property
    def tag(self) -> Path:
        """Where the checkpoint lies."""
        return self.state.inputs.folder / self.state.tag

    def round(self) -> None:
        """Save, write raw, load, read raw. Both kinds of files are new: what was there before is deleted."""
        ranks, state = self.ranks, self.state
        self._delete(self.tag)
        state.saved_tag = ""  # else it would not be saved again
        with PeakMemory() as memory:
            self.times["save"].append(timed(ranks, partial(save, state)))
        self.peak = max(self.peak, memory.peak)
        contents = [(self.tag / name).read_bytes() for name in state.engine.checkpoint_engine.files]
        self._delete(self.raw)
        self.times["raw write"].append(timed(ranks, partial(raw_write, self.raw, ranks.rank, contents)))
        del contents
        for path in (self.tag, self.raw):
            if ranks.is_first:
                forget(path)
            ranks.wait()
        self.times["load"].append(timed(ranks, self._load))
        self.times["raw read"].append(timed(ranks, lambda: raw_read(self.raw, ranks.rank)))

    def _delete(self, folder: Path) -> None:
        if self.ranks.is_first:
            shutil.rmtree(folder, ignore_errors=True)
            os.sync()
        self.ranks.wait()

    def _load(self) -> None:
        with redirect_stdout(StringIO()):
            resume(self.state)

    def report(self) -> dict[str, Any]:
        """Medians, ratios of each round's pairs, and sizes; on rank 0."""
        width = next(p for p in self.state.engine.module.parameters() if p.requires_grad).element_size()
        needed = trained_parameters(self.state) * (width + 4 + 8)
        stored = sum(path.stat().st_size for path in self.tag.iterdir())
        pairs = {name: list(zip(self.times[name], self.times[raw], strict=True)) for name, raw in
                 (("save", "raw write"), ("load", "raw read"))}  # fmt: skip
        save = statistics.median(self.times["save"])
        return {
            "ranks": self.ranks.world_size,
            "gigabytes": stored / 1e9,
            "seconds": {name: statistics.median(values) for name, values in self.times.items()},
            "save / raw write": statistics.median(a / b for a, b in pairs["save"]),
            "load / raw read": statistics.median(a / b for a, b in pairs["load"]),
            "size / what trains": stored / needed,
            "stalled at every_minutes 5": save / (300 + save),
            "memory of a save / checkpoint": self.peak * self.ranks.world_size / stored,
            "rounds": self.times,
        }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--local_rank", type=int)
    arguments = parser.parse_args()
    ranks = join()
    benchmark = Benchmark(arguments.run, ranks)
    try:
        for _ in range(arguments.rounds):
            benchmark.round()
        report = benchmark.report()
    finally:
        ranks.wait()
        if ranks.is_first:
            shutil.rmtree(benchmark.folder, ignore_errors=True)
    rows = [["", "figure"]]
    rows += [[f"seconds: {name}", f"{seconds:.2f}"] for name, seconds in report["seconds"].items()]
    rows += [[name, f"{value:.3f}"] for name, value in report.items() if isinstance(value, float)]
    ranks.say(f"{report['ranks']} ranks, {arguments.rounds} rounds, medians\n{aligned(rows)}")
    if arguments.json and ranks.is_first:
        write_json(arguments.json, report)
    leave()


if __name__ == "__main__":
    main()
