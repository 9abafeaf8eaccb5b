"""What a run would do on 8 to 1,024 GPUs, by the project's own planning code and by costs that are given.

    python -m benchmarks.scale RUN.yaml --device h100 [--num-new N] [--json FILE]

Placement, micro-batches, empty samples, rows, bytes over the network, checkpoints and memory are those that training
would use. What a GPU, the network and the disk achieve is given; benchmarks/README.md says what of it was measured.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from common.text_table import aligned
from pipeline.config.load import load_run
from pipeline.config.run import RunConfig
from pipeline.estimate.device import Device
from pipeline.estimate.imbalance import mlp_time
from pipeline.estimate.memory import checkpoint_bytes, network_per_token
from pipeline.estimate.report import Estimate
from pipeline.method.stage import Stage
from pipeline.training.utilization import PEAK_TFLOPS, flops_of_stage

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
EFFICIENT = 0.8


@dataclass(frozen=True)
class Costs:
    """What hardware achieves. Rates in 10^9 bytes per second, times in seconds.

    Attributes:
        utilization: of a GPU's peak, in matrix products of a step.
        inside: sent by each GPU to others of its node.
        between: sent by each GPU to other nodes, by a network adapter of its own.
        write: of a node to the file system.
        hash: read and hashed by a rank.
        detect: until ranks that lost another have ended.
        start: of a job, until its ranks have joined and loaded.
        failures: interruptions per GPU and hour.
    """

    utilization: float
    inside: float
    between: float
    write: float
    hash: float
    detect: float
    start: float
    failures: float


@dataclass(frozen=True)
class Point:
    """One number of GPUs. ``goodput`` is the share of time that is spent on steps that count."""

    gpus: int
    ep_size: int
    micro_batch: int
    accumulation: int
    useful_samples: float
    step_seconds: float
    exposed_network: float
    tokens_per_second_per_gpu: float
    goodput: float
    hours: float


def simulate(run: RunConfig, stage: Stage, estimate: Estimate, flops: float, peak: float, costs: Costs) -> Point:
    """One stage of a run on ``estimate.world_size`` GPUs.

    Args:
        run: the run.
        stage: of it.
        estimate: for that number of GPUs.
        flops: per token.
        peak: operations per second of a GPU.
        costs: what hardware achieves.
    """
    dims, settings, batch = estimate.dims, stage.settings, estimate.batch(stage, estimate.dims)
    tokens = batch.tokens * batch.accumulation  # that a rank computes per step, empty samples included
    useful = settings.global_batch_size / (batch.sequences * batch.accumulation * dims.world_size)
    mlps = estimate.plan.top_k * len(estimate.plan.moe_layers) * estimate.sizes.mlp
    share = mlps / (estimate.sizes.total + mlps * (estimate.plan.top_k - 1) / estimate.plan.top_k)
    computing = tokens * flops / (peak * costs.utilization) * (1 - share + share * mlp_time(estimate.plan, dims))
    network = network_per_token(estimate.sizes, estimate.plan, dims, batch, dtype=estimate.dtype, stage=stage)
    reducing = costs.inside
    if dims.world_size > estimate.per_node:  # a ring enters and leaves a node by the adapters of all of its GPUs
        reducing = min(costs.inside, costs.between * estimate.per_node / dims.ep_size)
    sending = (
        tokens * (network["tokens"] / costs.inside + (network["gradients"] + network["weights"]) / reducing) / 1e9
    )
    step = computing + sending
    speed = settings.global_batch_size * settings.sequence_length / step / dims.world_size
    goodput = _goodput(run, stage, estimate, costs)
    hours = settings.tokens / (speed * dims.world_size * goodput) / 3600
    return Point(
        gpus=dims.world_size,
        ep_size=dims.ep_size,
        micro_batch=batch.sequences,
        accumulation=batch.accumulation,
        useful_samples=useful,
        step_seconds=step,
        exposed_network=sending / step,
        tokens_per_second_per_gpu=speed,
        goodput=goodput,
        hours=hours,
    )


def _goodput(run: RunConfig, stage: Stage, estimate: Estimate, costs: Costs) -> float:
    """Without the time of saves, and of failures: the work since the last save, detection, start, verification."""
    size = checkpoint_bytes(estimate.sizes, estimate.plan, estimate.dims, estimate.dtype, stage) / 1e9
    nodes = max(1, estimate.world_size // estimate.per_node)
    save, interval = size / (costs.write * nodes), 60 * (run.checkpoint.every_minutes or 30)
    base = estimate.sizes.total * estimate.dtype.itemsize / 1e9
    verify = (size + base) / (costs.hash * estimate.world_size)
    lost = interval / 2 + costs.detect + costs.start + verify
    return 1 / (1 + save / interval + costs.failures / 3600 * estimate.world_size * lost)


def show(stage: Stage, points: list[Point]) -> str:
    """A table, and where efficiency falls."""
    rows = [["GPUs", "ep_size", "micro-batch", "useful", "step s", "network", "tokens/s/GPU", "efficiency", "goodput",
             "hours"]]  # fmt: skip
    best = points[0].tokens_per_second_per_gpu
    for p in points:
        rows.append([
            str(p.gpus), str(p.ep_size), f"{p.micro_batch} x {p.accumulation}", f"{p.useful_samples:.0%}",
            f"{p.step_seconds:.2f}", f"{p.exposed_network:.0%}", f"{p.tokens_per_second_per_gpu:,.0f}",
            f"{p.tokens_per_second_per_gpu / best:.0%}", f"{p.goodput:.1%}", f"{p.hours:.1f}",
        ])  # fmt: skip
    low = next((p.gpus for p in points if p.tokens_per_second_per_gpu < EFFICIENT * best), None)
    falls = f"below {EFFICIENT:.0%} from {low} GPUs on" if low else f"at least {EFFICIENT:.0%} up to {points[-1].gpus}"
    return f"stage {stage.number}: efficiency {falls}\n{aligned(rows)}"


def main() -> None:
    """Print a table per stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--device", default="h100")
    parser.add_argument("--num-new", type=int)
    parser.add_argument("--utilization", type=float, default=0.4)
    parser.add_argument("--inside", type=float, default=300.0, metavar="GB/S")
    parser.add_argument("--between", type=float, default=40.0, metavar="GB/S")
    parser.add_argument("--write", type=float, default=2.0, metavar="GB/S")
    parser.add_argument("--hash", type=float, default=1.0, metavar="GB/S")
    parser.add_argument("--detect", type=float, default=4.0, metavar="SECONDS")
    parser.add_argument("--start", type=float, default=180.0, metavar="SECONDS")
    parser.add_argument("--failures", type=float, default=1 / 50_000, metavar="PER_GPU_HOUR")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    run = load_run(options.run, options.set)
    costs = Costs(**{name: getattr(options, name) for name in Costs.__dataclass_fields__})
    device = Device.named(options.device)
    peaks = (t * 1e12 for name, t in PEAK_TFLOPS.items() if name.lower().replace(" ", "") in options.device.lower())
    peak = next(peaks, None)
    if peak is None:
        parser.error(f"--device {options.device}: its peak is not known; use one of {', '.join(PEAK_TFLOPS)}")
    first = Estimate(run, GPUS[0], device, num_new=options.num_new)
    estimates = [first.on(gpus) for gpus in GPUS]
    found: dict[str, list[Point]] = {}
    for stage in estimates[0].stages:
        flops = flops_of_stage(estimates[0].config, estimates[0].plan, stage)
        found[stage.name] = [simulate(run, stage, estimate, flops, peak, costs) for estimate in estimates]
        print(f"{show(stage, found[stage.name])}\n")
    if options.json:
        record = {name: [asdict(point) for point in points] for name, points in found.items()}
        options.json.write_text(json.dumps({"costs": asdict(costs), "stages": record}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
