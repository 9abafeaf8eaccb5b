"""What a cluster's ranks can do: who they are, whether their software agrees, how fast they compute and talk."""

import importlib.metadata
import os
import platform
import socket
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist

from common.text_table import aligned
from pipeline.cluster.measure import find_slow, measure_network, measure_speeds, speed_table
from pipeline.config.run import RunConfig
from pipeline.distributed.device import device_name, driver_version
from pipeline.distributed.process_group import Ranks, leave

PACKAGES = ("torch", "deepspeed", "transformers")
# What may differ from node to node.
OWN = ("node", "ranks")


def check_ranks(ranks: Ranks, megabytes: int, run: RunConfig | None = None) -> int:
    """Print the tables of nodes, of their speed and of bandwidths on rank 0; 1 where nodes differ.

    Args:
        ranks: all of them.
        megabytes: the largest message.
        run: whose expert-parallel groups are to stay within nodes.
    """
    found: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(found, describe_rank(ranks))
    nodes = describe_nodes(found)
    mismatches = find_mismatches(nodes)
    ranks.say(f"{ranks.world_size} ranks on {len(nodes)} nodes")
    ranks.say(aligned([list(nodes[0]), *([str(value) for value in node.values()] for node in nodes)]))
    names = [row["node"] for row in found]
    speeds = measure_speeds(ranks, names)
    ranks.say("")
    ranks.say(aligned(speed_table(names, speeds)))
    ranks.say("")
    titles = ["message", "all-reduce", "all-to-all", "ragged, in a node", "ragged, between nodes"]
    ranks.say(aligned([titles, *measure_network(ranks, megabytes, names)]))
    for line in [*find_slow(names, speeds), *crossing_groups(names, run)]:
        ranks.say(f"WARNING {line}")
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
        "device": device_name(ranks.device) if is_gpu else f"{platform.machine()} CPU",  # models may differ
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


def crossing_groups(names: list[str], run: RunConfig | None) -> list[str]:
    """A line if an expert-parallel group of the run lies on several nodes, between which tokens travel slower."""
    ep_size = 1 if run is None or run.parallel.ep_size == "auto" else run.parallel.ep_size
    groups = [names[first : first + ep_size] for first in range(0, len(names), ep_size)]
    crossing = sum(len(set(group)) > 1 for group in groups)
    if not crossing:
        return []
    return [
        f"parallel.ep_size {ep_size}: {crossing} of {len(groups)} expert-parallel groups lie on several nodes; "
        "take one that divides the ranks of each node"
    ]
