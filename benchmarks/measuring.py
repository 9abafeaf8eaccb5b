"""What the benchmarks share: passes that take turns, their times on two clocks, memory, common options."""

import argparse
import gc
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WARM_UP = 2  # rounds that are not counted
WALL, CPU = 0, 1
Taken = tuple[float, float]  # wall and CPU seconds


def _nothing() -> None:
    """Nothing to prepare."""


@dataclass(frozen=True)
class Turn:
    """What is timed when a name's turn comes.

    Attributes:
        name: of the row.
        parts: by name, what is run, one after the other; each is timed.
        prepare: run before each part, outside of its time.
    """

    name: str
    parts: dict[str, Callable[[], object]]
    prepare: Callable[[], object] = field(default=_nothing)


def timed(device: torch.device, action: Callable[[], object]) -> Taken:
    """Wall and CPU seconds of an action, a GPU's work included; the CPU time is all of the process's threads'."""
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    synchronize(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turns(
    turns: Sequence[Turn], rounds: int, device: torch.device, label: str
) -> dict[str, dict[str, list[Taken]]]:
    """Every turn once a round, in an order that moves on from round to round, so that drift hits all alike.

    Returns:
        By name of the turn, then of its part, what each counted round took.
    """
    times: dict[str, dict[str, list[Taken]]] = {turn.name: {part: [] for part in turn.parts} for turn in turns}
    for number in tqdm(range(-WARM_UP, rounds), desc=label, disable=not sys.stderr.isatty(), leave=False):
        start = number % len(turns)
        for turn in [*turns[start:], *turns[:start]]:
            for part, action in turn.parts.items():
                turn.prepare()
                taken = timed(device, action)
                if number >= 0:
                    times[turn.name][part].append(taken)
        gc.collect()
    return times


def ratio(taken: Sequence[Taken], yardstick: Sequence[Taken], clock: int) -> float:
    """The median over the rounds of each round's ratio, on the clock ``WALL`` or ``CPU``."""
    return median(mine[clock] / least[clock] for mine, least in zip(taken, yardstick, strict=True))


def milliseconds(taken: Sequence[Taken], clock: int = WALL) -> float:
    """The median."""
    return 1e3 * median(seconds[clock] for seconds in taken)


class PeakMemory:
    """The most anonymous memory of this process while a block runs, in bytes, above what it began with."""

    def __enter__(self) -> "PeakMemory":
        self.before, self.peak, self._done = anonymous_memory(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.peak = max(self.peak, anonymous_memory() - self.before)


def anonymous_memory() -> int:
    """Bytes of this process that no file stands behind; 0 where the system does not say."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.is_file() else ():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def add_options(parser: argparse.ArgumentParser, rounds: int) -> None:
    """The options of all benchmarks of computing."""
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=rounds, help="each runs everything once")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="write the results there too")


def check_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace, positive: Sequence[str]) -> None:
    """End with one line if an option is wrong; ``positive`` are those that must be at least 1."""
    for name in (*positive, "rounds"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(arguments, name)}: give at least 1")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here; leave it out")
