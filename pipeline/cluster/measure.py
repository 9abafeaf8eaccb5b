"""How fast ranks compute and talk to each other, for ``launch/check.sh``."""

import statistics
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from pipeline.distributed.process_group import Ranks

REPEATS = 5
SLOW = 0.8  # of the median rank's speed


def measure_speeds(ranks: Ranks, names: list[str]) -> list[dict[str, float]]:
    """What each rank computes per second: a matrix product, and a copy in its memory.

    On each node one rank measures at a time, as its ranks may share cores and memory.

    Args:
        ranks: all of them.
        names: of each rank's node.

    Returns:
        For each rank ``matrix product`` in 10^12 operations and ``memory`` in 10^9 bytes, read and written.
    """
    place = names[: ranks.rank].count(names[ranks.rank])
    speeds: dict[str, float] = {}
    for turn in range(max(Counter(names).values())):
        ranks.wait()
        if turn == place:
            speeds = _own_speeds(ranks.device)
    found: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(found, speeds)
    return found


def _own_speeds(device: torch.device) -> dict[str, float]:
    is_gpu = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if is_gpu else (1024, torch.float32)
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    source = torch.ones((256 if is_gpu else 64) * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    product = _fastest(device, lambda: matrix @ matrix)
    copy = _fastest(device, lambda: target.copy_(source))
    return {
        "matrix product": 2 * size**3 / product / 1e12,
        "memory": 2 * source.numel() * source.element_size() / copy / 1e9,
    }


def _seconds(device: torch.device, operation: Callable[[], Any]) -> float:
    started = time.perf_counter()
    operation()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _fastest(device: torch.device, operation: Callable[[], Any]) -> float:
    """Seconds of the fastest of ``REPEATS``; the first one only warms up."""
    return min([_seconds(device, operation) for _ in range(REPEATS + 1)][1:])


def speed_table(names: list[str], speeds: list[dict[str, float]]) -> list[list[str]]:
    """A row per node, each figure that of its slowest rank."""
    rows = [["slowest rank of", "matrix product", "memory"]]
    for node in dict.fromkeys(names):
        own = [speed for speed, name in zip(speeds, names, strict=True) if name == node]
        product, memory = (min(speed[what] for speed in own) for what in ("matrix product", "memory"))
        rows.append([node, f"{product:.3g} TFLOPS", f"{memory:.0f} GB/s"])
    return rows


def find_slow(names: list[str], speeds: list[dict[str, float]]) -> list[str]:
    """A line for each rank that is much slower than the median rank."""
    lines = []
    for what in speeds[0]:
        usual = statistics.median(speed[what] for speed in speeds)
        lines += [
            f"{what}: rank {rank} on {name} is slow, {speed[what] / usual:.0%} of the median rank"
            for rank, (name, speed) in enumerate(zip(names, speeds, strict=True))
            if speed[what] < SLOW * usual
        ]
    return lines


def measure_network(ranks: Ranks, megabytes: int, names: list[str]) -> list[list[str]]:
    """A row per message size: what each rank sends per second, by the usual counts of bytes.

    All-reduce: 2 (n - 1) / n times the message over the time (nccl-tests' bus bandwidth); all-to-all: (n - 1) / n.
    Ragged: an all-to-all of unequal parts, as tokens travel to experts, among the ranks of a node, and among those
    that have the same place on their nodes.

    Args:
        ranks: all of them.
        megabytes: the largest message.
        names: of each rank's node.
    """
    inside, between = _groups_by(names), _groups_by([str(names[:rank].count(name)) for rank, name in enumerate(names)])
    sizes = [size for size in (1, 8, 64, 512, 4096) if size < megabytes] + [megabytes]
    n = ranks.world_size
    rows = []
    for size in sizes:
        count = max(n, size * 2**20 // 4 // n * n)
        sent, received = torch.zeros(count, device=ranks.device), torch.empty(count, device=ranks.device)
        reduce = best_seconds(ranks, partial(dist.all_reduce, sent))
        exchange = best_seconds(ranks, partial(dist.all_to_all_single, received, sent))
        factors = (2 * (n - 1) / n / reduce, (n - 1) / n / exchange)
        ragged = [_ragged_rate(ranks, count, groups) for groups in (inside, between)]
        rates = [*(f"{count * 4 * factor / 1e9:.2f} GB/s" for factor in factors), *ragged]
        rows.append([f"{size} MB", *rates])
    return rows


def _groups_by(keys: list[str]) -> list[tuple[list[int], Any]]:
    """The ranks that share a key, with a process group of theirs; all ranks must call this."""
    members: dict[str, list[int]] = {}
    for rank, key in enumerate(keys):
        members.setdefault(key, []).append(rank)
    return [(group, dist.new_group(group)) for group in members.values()]


def _ragged_rate(ranks: Ranks, count: int, groups: list[tuple[list[int], Any]]) -> str:
    """What each rank sends per second to the others of its group, all groups at once."""
    members, group = next((members, group) for members, group in groups if ranks.rank in members)
    n, place = len(members), members.index(ranks.rank)
    if max(len(others) for others, _ in groups) == 1:
        return "-"
    unit = max(1, count // (n * (n + 1) // 2))
    sends = [unit * (1 + (place + other) % n) for other in range(n)]  # what a rank gets is what it sends
    sent, received = torch.zeros(sum(sends), device=ranks.device), torch.empty(sum(sends), device=ranks.device)
    took = best_seconds(ranks, partial(dist.all_to_all_single, received, sent, sends, sends, group=group))
    return f"{(sum(sends) - sends[place]) * 4 / took / 1e9:.2f} GB/s"


def best_seconds(ranks: Ranks, operation: Callable[[], Any]) -> float:
    """The fastest of ``REPEATS``, over the slowest rank each; the first one only warms up."""
    times = []
    for _ in range(REPEATS + 1):
        ranks.wait()
        took = torch.tensor([_seconds(ranks.device, operation)], device=ranks.device)
        dist.all_reduce(took, op=dist.ReduceOp.MAX)
        times.append(float(took))
    return min(times[1:])
