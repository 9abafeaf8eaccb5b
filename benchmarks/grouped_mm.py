"""One layer's new experts as a loop, as this project computes them, against torch's ``grouped_mm``.

    python -m benchmarks.grouped_mm [--hidden 2048 --intermediate 5504 ...] [--device cuda] [--json FILE]

Forward and backward, to inputs and weights, of gated MLPs in bf16 on ragged batches of rows.
"""

import argparse
import os
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measuring import WALL, Turn, check_options, in_turns, milliseconds, ratio
from common.files import write_json
from common.text_table import aligned
from pipeline.distributed.device import device_name
from pipeline.model.moe.linear import linear, two_linear

SPREAD = 0.02  # of random weights
UNEVEN = 0.3  # how far an expert's rows are from the mean, at most


@dataclass(frozen=True)
class Result:
    """Medians over the rounds: milliseconds of the loop, and the ratio of grouped_mm's time to it."""

    experts: int
    rows: int
    forward_ms: float
    forward_ratio: float
    both_ms: float
    both_ratio: float
    largest_difference: float


class Experts:
    """Weights of N experts in one buffer, as the optimizer flattens them: gate and up, then down, of each.

    Args:
        num: N.
        hidden: D.
        intermediate: F.
        device: where they lie.
    """

    def __init__(self, num: int, hidden: int, intermediate: int, device: torch.device) -> None:
        size = 3 * intermediate * hidden
        self.buffer = SPREAD * torch.randn(num * size, device=device)
        self.buffer = self.buffer.bfloat16().requires_grad_()
        place = 2 * intermediate * hidden
        self.gate_up_NGD = self.buffer.as_strided((num, 2 * intermediate, hidden), (size, hidden, 1))
        self.down_NDF = self.buffer.as_strided((num, hidden, intermediate), (size, intermediate, 1), place)

    def loop(self, x_AD: Tensor, counts: list[int]) -> Tensor:
        """One expert after another."""
        outputs = []
        for x, gate_up, down in zip(x_AD.split(counts), self.gate_up_NGD, self.down_NDF, strict=True):
            gate, up = two_linear(x, gate_up)
            outputs.append(linear(F.silu(gate) * up, down))
        return torch.cat(outputs)

    def grouped(self, x_AD: Tensor, ends_N: Tensor) -> Tensor:
        """All at once."""
        hidden_AG = F.grouped_mm(x_AD, self.gate_up_NGD.transpose(1, 2), offs=ends_N)
        gate, up = hidden_AG.chunk(2, dim=-1)
        return F.grouped_mm(F.silu(gate) * up, self.down_NDF.transpose(1, 2), offs=ends_N)


def measure(num: int, rows: int, arguments: argparse.Namespace, device: torch.device) -> Result:
    """One number of experts and mean of rows per expert."""
    torch.manual_seed(0)
    experts = Experts(num, arguments.hidden, arguments.intermediate, device)
    uneven = [round(rows * UNEVEN * (2 * i / max(1, num - 1) - 1)) for i in range(num)]
    counts = [max(1, rows + extra) for extra in uneven]
    ends = torch.tensor(counts, device=device).cumsum(0).int()
    x = torch.randn(sum(counts), arguments.hidden, device=device).bfloat16().requires_grad_()
    upstream = torch.randn_like(x)
    ways = {"loop": partial(experts.loop, x, counts), "grouped": partial(experts.grouped, x, ends)}

    def forward(way: str) -> None:
        with torch.no_grad():
            ways[way]()

    def both(way: str) -> None:
        torch.autograd.grad(ways[way](), (x, experts.buffer), upstream)

    turns = [Turn(way, {"forward": partial(forward, way), "both": partial(both, way)}) for way in ways]
    times = in_turns(turns, arguments.rounds, device, f"{num} experts, {rows} rows")
    found = {part: (times["loop"][part], times["grouped"][part]) for part in ("forward", "both")}
    with torch.no_grad():
        difference = float((ways["loop"]().float() - ways["grouped"]().float()).abs().max())
    return Result(
        num,
        rows,
        milliseconds(found["forward"][0]),
        ratio(found["forward"][1], found["forward"][0], WALL),
        milliseconds(found["both"][0]),
        ratio(found["both"][1], found["both"][0], WALL),
        difference,
    )


def show(results: list[Result]) -> str:
    """A table."""
    rows = [
        ["experts", "rows per expert", "loop, forward ms", "grouped x", "loop, both ms", "grouped x", "difference"]
    ]
    for r in results:
        figures = (f"{r.forward_ms:.3f}", f"{r.forward_ratio:.2f}", f"{r.both_ms:.3f}", f"{r.both_ratio:.2f}")
        rows.append([str(r.experts), str(r.rows), *figures, f"{r.largest_difference:.1e}"])
    return aligned(rows)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.grouped_mm", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--intermediate", type=int, default=1536)
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 4, 8], help="of the layer on this rank")
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64, 256, 1024], help="per expert, on average")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="write the results there too")
    arguments = parser.parse_args()
    check_options(parser, arguments, ("hidden", "intermediate"))
    if min(*arguments.experts, *arguments.rows) < 1:
        parser.error("--experts and --rows: give at least 1")
    return arguments


def main() -> int:
    """Measure, print, and write the JSON that was asked for."""
    arguments = parse_arguments()
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    device = torch.device(arguments.device)
    print(
        f"{device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{arguments.rounds} rounds"
    )
    print(f"bf16, hidden {arguments.hidden}, intermediate {arguments.intermediate}")
    results = [measure(num, rows, arguments, device) for num in arguments.experts for rows in arguments.rows]
    print(show(results))
    if arguments.json:
        conditions = {"device": device_name(device), "torch": torch.__version__, "hidden": arguments.hidden}
        write_json(arguments.json, {**conditions, "results": [asdict(r) for r in results]})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
