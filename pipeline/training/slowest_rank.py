"""Which rank the others wait for: each measures how long it works in a step, and the slowest is named.

A rank's own time is that of its micro-steps: reading samples, forward and backward, up to the reduction of gradients,
without its waits in the exchanges with other ranks. With ZeRO-2 it is that of reading and the forward, as gradients
are reduced during the backward. A rank may be slow because of its node, or because it computes more rows than others.
"""

import statistics
from typing import Any

import torch
from torch import Tensor

from pipeline.distributed.own_time import OWN_TIME
from pipeline.distributed.process_group import Ranks
from pipeline.model.backbone import decoder_layers
from pipeline.records.metrics import SlowestRank

WORTH_NAMING = 10.0  # percent


def watch_backward(engine: Any) -> None:
    """Let the end of each backward count, which is where the lowest layer that trains has its gradients.

    DeepSpeed reduces gradients only then, unless it divides them among the ranks (ZeRO-2).
    """
    if engine.zero_optimization_partition_gradients():
        return
    parts = (engine.module.get_input_embeddings(), *decoder_layers(engine.module))
    trained = ([p for p in part.parameters() if p.requires_grad] for part in parts)
    for parameter in next(parameters for parameters in trained if parameters):
        parameter.register_post_accumulate_grad_hook(lambda _: OWN_TIME.mark())


def own_seconds(ranks: Ranks) -> Tensor:
    """This rank's own time in the step that ends, at its place among all ranks', which a sum then fills [R]."""
    seconds = [0.0] * ranks.world_size
    seconds[ranks.rank] = OWN_TIME.take()
    return torch.tensor(seconds, device=ranks.device)


def find_slowest(seconds: list[float], hosts: list[str]) -> SlowestRank | None:
    """The rank that worked longest, if that is 10 % longer than the median of the others; else None.

    Args:
        seconds: own time of each rank.
        hosts: of each rank's node.
    """
    rank = max(range(len(seconds)), key=seconds.__getitem__)
    others = statistics.median(seconds[:rank] + seconds[rank + 1 :] or seconds)
    percent = 100 * (seconds[rank] / others - 1) if others > 0 else 0.0
    return SlowestRank(rank=rank, host=hosts[rank], percent=percent) if percent >= WORTH_NAMING else None
