"""How long a whole training step takes, as a multiple of a model with two dense MLPs per layer.

    python -m benchmarks.train_step [--layers 30 --tokens 1024 ...] [--device cuda] [--json FILE]
    deepspeed --num_gpus 2 --module benchmarks.train_step --ep [--experts 5 ...]

Two dense MLPs are the least that top-2 routing must compute; all else of the model is the same, and frozen alike.
Benchmarks/README.md says what the columns mean.
"""

import argparse
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.measuring import (
    CPU,
    DTYPES,
    WALL,
    Taken,
    Turn,
    add_options,
    in_turns,
    milliseconds,
    ratio,
)
from benchmarks.step_engine import Memory, memory, step_times
from benchmarks.step_models import SMOLLM2, Bench, Sizes, check_sizes, contenders
from benchmarks.step_ranks import compare_ep, show_ep
from benchmarks.step_run import run_config, start_stage1, write_upcycled
from common.errors import exit_on_user_error
from common.files import write_json
from common.text_table import aligned
from pipeline.distributed.device import device_name
from pipeline.distributed.process_group import Ranks, environment_world_size, join, leave
from pipeline.method.stages import find_stage

TARGETS = "targets: ours, stage 1 at most 1.05 x its floor; the whole train_step at most 1.2 x the floor with AdamW"
GROWTH = {"cpu": "growth of the process", "cuda": "most allocated"}


@dataclass(frozen=True)
class Row:
    """One row: its median time, and the median of each round's ratio to its floor, on both clocks."""

    name: str
    trains: str
    ms: float
    wall: float
    cpu: float

    @classmethod
    def of(cls, name: str, trains: str, taken: list[Taken], floor: list[Taken]) -> "Row":
        """From what the rounds took."""
        return cls(name, trains, milliseconds(taken), ratio(taken, floor, WALL), ratio(taken, floor, CPU))


def models(sizes: Sizes, dtype: str, arguments: argparse.Namespace, folder: Path, ranks: Ranks) -> list[Row]:
    """Forward and backward of each contender, without an engine."""
    bench, run = Bench(sizes, DTYPES[dtype], ranks.device), run_config(sizes, dtype, 1, folder)
    everyone = contenders(bench, {number: find_stage(run, number) for number in (1, 2)}, arguments.classifiers)
    turns = []
    for contender in everyone:
        action, prepare = bench.turn(contender)
        turns.append(Turn(contender.name, {"": action}, prepare))
    times = in_turns(turns, arguments.rounds, bench.device, f"models, {dtype}")
    return [Row.of(c.name, c.trains, times[c.name][""], times[c.floor][""]) for c in everyone]


def engine(sizes: Sizes, dtype: str, arguments: argparse.Namespace, folder: Path, ranks: Ranks) -> list[Row]:
    """Stage 1 with the engine and its optimizer, apart and together."""
    bench = Bench(sizes, DTYPES[dtype], ranks.device)
    state = start_stage1(sizes, run_config(sizes, dtype, 1, folder), folder, 1, ranks)
    try:
        times = step_times(bench, state, arguments.rounds, f"engine, {dtype}")
    finally:
        state.close()
    whole = times["floor with plain AdamW"]
    return [Row.of(name, "", taken, whole) for name, taken in times.items()]


PARTS = {"forward + backward, x its floor": models, "a step of stage 1, x the floor with AdamW": engine}


def show(title: str, rows: list[Row]) -> str:
    """A table."""
    cells = [[title, "trains", "ms", "wall", "CPU"]]
    cells += [[r.name, r.trains, f"{r.ms:.0f}", f"{r.wall:.2f}", f"{r.cpu:.2f}"] for r in rows]
    return aligned(cells)


def show_memory(found: Memory, device: str) -> str:
    """The peak as a multiple of what is needed, and the parts of that."""
    parts = ", ".join(f"{name} {value / found.needed:.0%}" for name, value in asdict(found).items() if name != "peak")
    return f"memory of stage 1, {GROWTH[device]}: {found.peak / found.needed:.2f} x what it needs ({parts})"


def one_rank(arguments: argparse.Namespace, sizes: Sizes) -> dict[str, Any]:
    """All that needs one rank; prints tables, and returns the figures."""
    with TemporaryDirectory() as name:
        folders = {dtype: Path(name) / dtype for dtype in arguments.dtypes}
        for dtype, folder in folders.items():
            write_upcycled(sizes, DTYPES[dtype], folder, arguments.device)
        # In processes that join by themselves, so before this one joins.
        held = {dtype: memory(sizes, dtype, folder) for dtype, folder in folders.items()}
        ranks = join()
        say_conditions(arguments, sizes, ranks)
        report: dict[str, Any] = {}
        for dtype, folder in folders.items():
            print(f"\n{dtype}: {show_memory(held[dtype], arguments.device)}", flush=True)
            report[dtype] = {"memory": asdict(held[dtype])}
            for title, part in PARTS.items():
                rows = part(sizes, dtype, arguments, folder, ranks)
                print(f"\n{show(f'{dtype}: {title}', rows)}", flush=True)
                report[dtype][title] = [asdict(row) for row in rows]
    print(f"\n{TARGETS}")
    return report


def several_ranks(arguments: argparse.Namespace, sizes: Sizes) -> dict[str, Any]:
    """Expert parallelism over all ranks against none; rank 0 prints, and all return the figures."""
    ranks = join()
    say_conditions(arguments, sizes, ranks)
    report: dict[str, Any] = {}
    for dtype in arguments.dtypes:
        report[dtype] = compare_ep(sizes, dtype, arguments.rounds, ranks)
        ranks.say(f"\n{show_ep(dtype, report[dtype], sizes, ranks)}")
    return report


def say_conditions(arguments: argparse.Namespace, sizes: Sizes, ranks: Ranks) -> None:
    """What is measured, and on what."""
    where, threads = device_name(ranks.device), torch.get_num_threads()
    ranks.say(f"{sizes}\n{where}, {threads} threads, torch {torch.__version__}, {arguments.rounds} rounds")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step", description=(__doc__ or "").split("\n")[0]
    )
    for name, value in SMOLLM2.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--tokens", type=int, default=1024, help="per rank and step")
    parser.add_argument("--experts", type=int, default=4, help="of each layer, expert 0 included")
    parser.add_argument("--classifiers", type=int, default=7, help="layers with a routing classifier in stage 2")
    parser.add_argument("--ep", action="store_true", help="under a launcher: ep_size of all ranks against 1")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    add_options(parser, rounds=10)
    arguments = parser.parse_args()
    check_sizes(parser, arguments, "the floors are two MLPs")
    if arguments.classifiers < 0:
        parser.error(f"--classifiers {arguments.classifiers}: give at least 0")
    world_size = environment_world_size()
    if arguments.ep and world_size < 2:
        parser.error("--ep: start it with deepspeed --num_gpus 2 --module benchmarks.train_step --ep")
    if not arguments.ep and world_size > 1:
        parser.error(f"{world_size} ranks: add --ep, or start it with python -m benchmarks.train_step")
    return arguments


def main() -> int:
    """Measure, print, and write the JSON that was asked for."""
    arguments = parse_arguments()
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the process group's backend follows what is visible
    sizes = Sizes(**{name: getattr(arguments, name) for name in Sizes.__dataclass_fields__})
    report = several_ranks(arguments, sizes) if arguments.ep else one_rank(arguments, sizes)
    ranks = join()
    if arguments.json and ranks.is_first:
        conditions = {"sizes": asdict(sizes), "device": device_name(ranks.device), "threads": torch.get_num_threads()}
        write_json(arguments.json, {**conditions, "torch": torch.__version__, "results": report})
    leave()
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_on_user_error(main))
