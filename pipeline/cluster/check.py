"""What a cluster's ranks can do together: who they are, whether their software agrees, and how fast they talk."""

import importlib.metadata
import os
import platform
import socket
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from common.text_table import aligned
from pipeline.distributed.device import device_name, driver_version
from pipeline.distributed.process_group import Ranks, leave

PACKAGES = ("torch", "deepspeed", "transformers")
# What may differ from node to node.
OWN = ("node", "ranks")


def check_ranks(ranks: Ranks, megabytes: int) -> int:
    """Print the table of nodes and that of bandwidths on rank 0; 1 where nodes differ."""
    found: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(found, describe_rank(ranks))
    nodes = describe_nodes(found)
    mismatches = find_mismatches(nodes)
    ranks.say(f"{ranks.world_size} ranks on {len(nodes)} nodes")
    ranks.say(aligned([list(nodes[0]), *([str(value) for value in node.values()] for node in nodes)]))
    ranks.say("")
    ranks.say(aligned([["message", "all-reduce", "all-to-all"], *measure(ranks, megabytes)]))
    for line in mismatches:
        ranks.say(f"MISMATCH {line}")
    ranks.say("differences may give other results or errors: fix them" if mismatches else "all nodes agree")
    leave()
    return 1 if mismatches else 0


def describe_rank(ranks: Ranks) -> dict[str, str]:
    """What this rank runs on and with."""
    is_gpu = ranks.device.type == "cuda"
    description = {
        "node": socket.gethostname(),
        "device": device_name(ranks.device),
        "backend": dist.get_backend(),
        "threads": os.environ.get("OMP_NUM_THREADS", "-"),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }
    if is_gpu:
        description["memory"] = f"{torch.cuda.get_device_properties(ranks.device).total_memory / 2**30:.0f} GiB"
        description["cuda"] = str(torch.version.cuda)
        description["driver"] = driver_version() or "-"
        description["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return description


def describe_nodes(found: list[dict[str, str]]) -> list[dict[str, str]]:
    """A row per node; where its own ranks differ, all their values."""
    nodes: dict[str, list[dict[str, str]]] = {}
    for row in found:
        nodes.setdefault(row["node"], []).append(row)
    columns = list(dict.fromkeys(key for row in found for key in row if key != "node"))
    return [
        {"node": name, "ranks": str(len(rows))}
        | {key: " / ".join(dict.fromkeys(row.get(key, "-") for row in rows)) for key in columns}
        for name, rows in nodes.items()
    ]


def find_mismatches(nodes: list[dict[str, str]]) -> list[str]:
    """A line for each value that differs from what most nodes have."""
    lines = []
    for key in nodes[0]:
        if key in OWN:
            continue
        usual, _ = Counter(node[key] for node in nodes).most_common(1)[0]
        lines += [f"{key}: {node['node']} has {node[key]}, {nodes_with(nodes, key, usual)} {usual}"
                  for node in nodes if node[key] != usual]  # fmt: skip
        lines += [f"{key}: {node['node']}'s own ranks differ: {usual}" for node in nodes
                  if node[key] == usual and " / " in usual]  # fmt: skip
    if len({node["ranks"] for node in nodes}) > 1:
        lines.append("ranks: " + ", ".join(f"{node['node']} has {node['ranks']}" for node in nodes))
    return lines


def nodes_with(nodes: list[dict[str, str]], key: str, value: str) -> str:
    """The nodes that have a value, in words."""
    names = [node["node"] for node in nodes if node[key] == value]
    return f"{names[0]} has" if len(names) == 1 else f"{len(names)} others have"


def measure(ranks: Ranks, megabytes: int) -> list[list[str]]:
    """A row per message size: what each rank sends per second, by the usual counts of bytes.

    All-reduce: 2 (n - 1) / n times the message over the time (nccl-tests' bus bandwidth); all-to-all: (n - 1) / n.
    """
    sizes = [size for size in (1, 8, 64, 512, 4096) if size < megabytes] + [megabytes]
    n = ranks.world_size
    rows = []
    for size in sizes:
        count = max(n, size * 2**20 // 4 // n * n)
        sent, received = torch.zeros(count, device=ranks.device), torch.empty(count, device=ranks.device)
        reduce = best_seconds(ranks, partial(dist.all_reduce, sent))
        exchange = best_seconds(ranks, partial(dist.all_to_all_single, received, sent))
        factors = (2 * (n - 1) / n / reduce, (n - 1) / n / exchange)
        rows.append([f"{size} MB", *(f"{count * 4 * factor / 1e9:.2f} GB/s" for factor in factors)])
    return rows


def best_seconds(ranks: Ranks, operation: Callable[[], Any]) -> float:
    """The fastest of five, over the slowest rank each; the first one only warms up."""
    best = float("inf")
    for repeat in range(6):
        ranks.wait()
        started = time.perf_counter()
        operation()
        if ranks.device.type == "cuda":
            torch.cuda.synchronize(ranks.device)
        took = torch.tensor([time.perf_counter() - started], device=ranks.device)
        dist.all_reduce(took, op=dist.ReduceOp.MAX)
        if repeat:
            best = min(best, float(took))
    return best
