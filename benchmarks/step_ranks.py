"""A whole training step with expert parallelism over all ranks against the same step without, and its parts."""

import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import torch

from benchmarks.measuring import CPU, DTYPES, WALL, Turn, in_turns, milliseconds, ratio
from benchmarks.step_models import Sizes
from benchmarks.step_run import run_config, start_stage1, write_upcycled
from common.text_table import aligned
from pipeline.distributed.parallel_dims import imbalance
from pipeline.distributed.process_group import Ranks
from pipeline.training.state import TrainingState
from pipeline.training.step import train_step

ROOT = str(Path(__file__).resolve().parents[1])
ROUNDS_OF_PARTS = 5
REST = "train_step"
# What is timed, by the function's qualified name; each time is without that of the functions in it.
PARTS = {
    "Router.forward": "router",
    "sorted_choices": "sorting the choices",
    "Exchange.plan": "counts: exchange and plan",
    "Exchange.send": "dispatch: begun",
    "LlamaMLP.forward": "expert 0, while rows travel",
    "Exchange.arrived": "dispatch: until all rows are here, sorted",
    "LocalExperts.forward": "new experts",
    "Exchange.send_back": "combine: rows sent back",
    "MoELayer.forward": "gathering rows, adding outputs",
    "_Arrive.backward": "backward: gradients begun to be sent",
    "_Depart.backward": "backward: until all gradients are here",
    "DeepSpeedEngine.backward": "backward: all else",
    "DeepSpeedEngine.step": "optimizer step",
    REST: "attention, head, losses, metrics",
}
# Functions that wait for other ranks, and the function by whose call a rank lets the others go on.
WAITS = {name: name for name in ("Exchange.plan", "Exchange.send_back")}
WAITS |= {"Exchange.arrived": "Exchange.send", "_Depart.backward": "_Arrive.backward"}


@dataclass
class FunctionTimes:
    """Times of Python functions by their names, by Python's own hook for profilers; true where a CPU computes.

    Attributes:
        own: seconds in a function's calls, without those in other functions that are timed.
        calls: when each call began and ended, in seconds of a clock that all processes of a machine share.
    """

    names: frozenset[str]
    own: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    calls: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    _open: list[tuple[FrameType, float, float]] = field(default_factory=list)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Time this thread's calls while a block runs."""
        sys.setprofile(self._event)
        try:
            yield
        finally:
            sys.setprofile(None)

    def _event(self, frame: FrameType, event: str, _argument: Any) -> None:
        if event == "call" and frame.f_code.co_qualname in self.names:
            self._open.append((frame, time.perf_counter(), 0.0))
        elif event == "return" and self._open and self._open[-1][0] is frame:
            _, began, inside = self._open.pop()
            ended, name = time.perf_counter(), frame.f_code.co_qualname
            self.own[name] += ended - began - inside
            self.calls[name].append((began, ended))
            if self._open:
                outer, outer_began, outer_inside = self._open[-1]
                self._open[-1] = outer, outer_began, outer_inside + ended - began


def compare_ep(sizes: Sizes, dtype: str, rounds: int, ranks: Ranks) -> dict[str, Any]:
    """Whole steps of stage 1 at ep_size 1 and at that of all ranks, in turns; then the parts of each on their own.

    Returns:
        ``seconds`` of each ep_size (the median), ``wall`` and ``cpu`` (ratio of the larger ep_size to 1), and on a
        CPU ``parts``, by ep_size: seconds of each part per step, the mean over ranks.
    """
    with shared_folder(ranks) as folder:
        if ranks.is_first:
            write_upcycled(sizes, DTYPES[dtype], folder)
        ranks.wait()
        run = run_config(sizes, dtype, ranks.world_size, folder)
        states = {ep: start_stage1(sizes, run, folder, ep, ranks) for ep in (1, ranks.world_size)}
        try:
            turns = [Turn(str(ep), {"": partial(train_step, state)}, ranks.wait) for ep, state in states.items()]
            times = {ep: times[""] for ep, times in in_turns(turns, rounds, ranks.device, f"ep, {dtype}").items()}
            spread = times[str(ranks.world_size)]
            report: dict[str, Any] = {
                "seconds": {ep: milliseconds(taken) / 1e3 for ep, taken in times.items()},
                "wall": ratio(spread, times["1"], WALL),
                "cpu": ratio(spread, times["1"], CPU),
            }
            if ranks.device.type == "cpu":
                report["parts"] = {str(ep): parts(state, ranks) for ep, state in states.items()}
        finally:
            for state in states.values():
                state.close()
    return report


@contextmanager
def shared_folder(ranks: Ranks) -> Iterator[Path]:
    """A folder of this machine that rank 0 makes and, when all are done, deletes."""
    folder = TemporaryDirectory() if ranks.is_first else None
    name = [folder.name if folder else ""]
    torch.distributed.broadcast_object_list(name)
    try:
        yield Path(name[0])
    finally:
        ranks.wait()
        if folder:
            folder.cleanup()


def parts(state: TrainingState, ranks: Ranks) -> dict[str, float]:
    """Seconds of a step by part, with ``waiting`` for other ranks taken out of the parts that wait."""
    taken: dict[str, list[float]] = defaultdict(list)
    for _ in range(ROUNDS_OF_PARTS):
        times = FunctionTimes(frozenset(PARTS))
        ranks.wait()
        with times.taken():
            train_step(state)
        waited = waiting(times, ranks)
        for name in PARTS:
            taken[name].append(times.own[name] - waited.get(name, 0.0))
        taken["waiting"].append(sum(waited.values()))
    mine = {name: median(seconds) for name, seconds in taken.items()}
    everyone: list[Any] = [None] * ranks.world_size
    torch.distributed.all_gather_object(everyone, mine)
    return {PARTS.get(name, name): mean(one[name] for one in everyone) for name in mine}


def waiting(times: FunctionTimes, ranks: Ranks) -> dict[str, float]:
    """By function, how long its calls stood still because another rank had not come as far."""
    everyone: list[Any] = [None] * ranks.world_size
    torch.distributed.all_gather_object(everyone, {name: times.calls[name] for name in {*WAITS, *WAITS.values()}})
    waited = {}
    for name, releases in WAITS.items():
        last = [max(began for began, _ in calls) for calls in zip(*(one[releases] for one in everyone), strict=True)]
        mine = zip(times.calls[name], last, strict=True)
        waited[name] = sum(max(0.0, min(ended, latest) - began) for (began, ended), latest in mine)
    return waited


def show_ep(dtype: str, report: dict[str, Any], sizes: Sizes, ranks: Ranks) -> str:
    """The comparison, and the parts as shares of the step at ep_size 1."""
    ep, uneven = str(ranks.world_size), imbalance(sizes.experts - 1, ranks.world_size)
    lines = [
        f"{dtype}: a step of stage 1 on {ep} ranks, ep_size {ep} against 1: wall {report['wall']:.2f} x, "
        f"CPU {report['cpu']:.2f} x (the busiest rank's rows by placement: {uneven:.2f} x the mean rank's)"
    ]
    if "parts" in report:
        whole = sum(report["parts"]["1"].values())
        cells = [["part, % of the step at ep_size 1", "ep_size 1", f"ep_size {ep}"]]
        cells += [
            [part, *(f"{report['parts'][size][part] / whole:.1%}" for size in ("1", ep))]
            for part in report["parts"][ep]
        ]
        lines.append(aligned(cells))
    return "\n".join(lines)
