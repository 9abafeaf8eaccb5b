"""What stage 1 holds and reaches on one rank, beside what ``estimate`` says: memory, tokens per second, MFU.

    python -m benchmarks.stage1 [--layers 30 --hidden 576 ... --tokens 1024] [--device cuda] [--json FILE]

A real stage of a model with random weights and tokens. Benchmarks/README.md says more.
"""

import argparse
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.measuring import DTYPES, PeakMemory, add_options, anonymous_memory
from benchmarks.step_models import SMOLLM2, Sizes, check_sizes
from benchmarks.step_run import run_config, start_stage1, write_upcycled
from common.errors import exit_on_user_error
from common.files import write_json
from common.text_table import aligned
from pipeline.distributed.device import device_name
from pipeline.distributed.process_group import join, leave, peak_memory_bytes
from pipeline.estimate.device import Device
from pipeline.estimate.report import Estimate
from pipeline.records.metrics import StepRow
from pipeline.training.step import train_step

WARM_UP = 3  # steps
LLAMA_3B = {"layers": 28, "hidden": 3072, "intermediate": 8192, "heads": 24, "vocab": 128256, "sequence": 1024}


@dataclass(frozen=True)
class Found:
    """What one kind of stage 1 held and reached.

    Attributes:
        name: of the row.
        estimate: bytes by kind, as ``estimate`` says; ``peak`` is their sum, without the process's own.
        peak: bytes, on a GPU the most that torch allocated, else what the process grew by.
        seconds: of a step, the median.
        tokens_per_second: of that step.
        mfu: of that step; None where the device's peak is not known.
    """

    name: str
    estimate: dict[str, float]
    peak: int
    seconds: float
    tokens_per_second: float
    mfu: float | None


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own, whose memory nothing else has touched."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(sizes: Sizes, dtype: str, folder: Path, steps: int, checkpointing: bool) -> Found:
    """Train some steps."""
    ranks = join()
    run = run_config(sizes, dtype, 1, folder, activation_checkpointing=checkpointing)
    estimate = Estimate(run, 1, Device(ranks.device.type), ep_size=1)
    on_gpu = ranks.device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else anonymous_memory()
    state = start_stage1(sizes, run, folder, 1, ranks)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    rows: list[StepRow] = []
    with PeakMemory() as growth:
        for _ in range(WARM_UP + steps):
            rows.append(train_step(state))
    peak = (peak_memory_bytes(ranks.device) if on_gpu else growth.before + growth.peak) - before
    state.close()
    leave()
    kinds = estimate.memory(estimate.stages[0])
    kinds["peak"] -= kinds.pop("process") + (kinds.pop("allocator") if on_gpu else 0.0)
    row = sorted(rows[WARM_UP:], key=lambda row: row.seconds)[steps // 2]
    seconds = median(row.seconds for row in rows[WARM_UP:])
    name = f"{dtype}, activations {'computed again' if checkpointing else 'kept'}"
    return Found(name, kinds, int(peak), seconds, sizes.tokens / seconds, row.mfu)


def show(found: list[Found]) -> str:
    """Two tables."""
    kinds = [kind for kind in found[0].estimate if kind != "peak"]
    memory = [["GB", *kinds, "estimate", "measured", "measured / estimate"]]
    speed = [["", "ms per step", "tokens/s", "MFU"]]
    for one in found:
        estimate = one.estimate["peak"]
        cells = [*(one.estimate[kind] for kind in kinds), estimate, float(one.peak)]
        memory.append([one.name, *(f"{value / 1e9:.2f}" for value in cells), f"{one.peak / estimate:.2f}"])
        mfu = "-" if one.mfu is None else f"{one.mfu:.1%}"
        speed.append([one.name, f"{1e3 * one.seconds:.0f}", f"{one.tokens_per_second:,.0f}", mfu])
    return f"{aligned(memory)}\n\n{aligned(speed)}"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stage1", description=(__doc__ or "").split("\n")[0])
    for name, value in SMOLLM2.items():
        parser.add_argument(f"--{name}", type=int, help=f"{value}, with --llama-3b {LLAMA_3B[name]}")
    parser.add_argument("--llama-3b", action="store_true", help="sizes of Llama-3.2-3B where no other is given")
    parser.add_argument("--tokens", type=int, default=1024, help="per step, all in one micro-batch")
    parser.add_argument("--experts", type=int, default=3, help="of each layer, expert 0 included")
    add_options(parser, rounds=10)
    arguments = parser.parse_args()
    for name, value in (LLAMA_3B if arguments.llama_3b else SMOLLM2).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    check_sizes(parser, arguments, "the first one is frozen")
    return arguments


def main() -> int:
    """Measure, print, and write the JSON that was asked for."""
    arguments = parse_arguments()
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the process group's backend follows what is visible
    sizes = Sizes(**{name: getattr(arguments, name) for name in Sizes.__dataclass_fields__})
    device = torch.device(arguments.device)
    print(f"{sizes}\n{device_name(device)}, torch {torch.__version__}, {arguments.rounds} steps after {WARM_UP}")
    found: list[Found] = []
    for dtype in arguments.dtypes:
        with TemporaryDirectory() as name:
            apart(write_upcycled, sizes, DTYPES[dtype], Path(name), arguments.device)
            for checkpointing in (False, True):
                found.append(apart(measure, sizes, dtype, Path(name), arguments.rounds, checkpointing))
    print(f"\n{show(found)}")
    if arguments.json:
        conditions = {"sizes": asdict(sizes), "device": device_name(device), "torch": torch.__version__}
        write_json(arguments.json, {**conditions, "results": [asdict(one) for one in found]})
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_on_user_error(main))
