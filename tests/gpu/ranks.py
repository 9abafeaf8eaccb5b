"""What the GPU tests run on a rank."""

import math
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.distributed.own_time import OWN_TIME
from pipeline.distributed.process_group import Ranks, forget_earlier_stages
from pipeline.model.backbone import moe_layers
from pipeline.model.moe import MoELayer
from pipeline.training.state import TrainingState
from pipeline.training.step import train_step
from tests.distributed.stages import stage_inputs

SLEEP = 200_000_000  # cycles, which a GPU of 1 to 2 GHz takes 0.1 to 0.2 s for


def waits_of_layers(ranks: Ranks, tree: dict[str, Any], number: int, folder: Path) -> list[tuple[int, int]]:
    """How often each layer's forward waits for the GPU, and how often its backward does, as CUDA itself counts."""
    state = TrainingState.start(stage_inputs(tree, number, folder, ranks), ranks)
    found = []
    for layer in moe_layers(state.engine.module):
        width = layer.router.wg.in_features
        x_TD = torch.randn(64, width, device=ranks.device, dtype=state.engine.module.dtype, requires_grad=True)
        layer(x_TD).float().sum().backward()  # warms up
        found.append(_waits(layer, x_TD))
    state.close()
    return found


def _waits(layer: MoELayer, x_TD: Tensor) -> tuple[int, int]:
    counts = []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss = layer(x_TD).float().sum()
            counts.append(_synchronizing(caught))
            loss.backward()
            counts.append(_synchronizing(caught) - counts[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return counts[0], counts[1]


def _synchronizing(caught: list[Any]) -> int:
    return sum("synchronizing" in str(warning.message) for warning in caught)


def own_and_waited(ranks: Ranks) -> dict[str, float]:
    """A micro-step that computes, waits and computes as long again each: what counts, and what the clock says."""
    torch.cuda._sleep(1000)  # loads the kernel
    torch.cuda.synchronize()
    started = time.perf_counter()
    torch.cuda._sleep(SLEEP)
    torch.cuda.synchronize()
    one = time.perf_counter() - started
    started = time.perf_counter()
    OWN_TIME.begin(ranks.device)
    torch.cuda._sleep(SLEEP)
    with OWN_TIME.waiting():
        torch.cuda._sleep(SLEEP)
    torch.cuda._sleep(SLEEP)
    OWN_TIME.mark()
    torch.cuda._sleep(SLEEP)  # the backward does not count
    launched = time.perf_counter() - started
    own = OWN_TIME.take()
    torch.cuda.synchronize()
    return {"one": one, "own": own, "all": time.perf_counter() - started, "launched": launched}


def memory_and_figures(ranks: Ranks, tree: dict[str, Any], folder: Path, steps: int) -> dict[str, float]:
    """The most that torch allocates in steps of stage 1, and what the last step's row says."""
    forget_earlier_stages(ranks.device)
    before = torch.cuda.memory_allocated(ranks.device)
    state = TrainingState.start(stage_inputs(tree, 1, folder, ranks), ranks)
    torch.cuda.reset_peak_memory_stats(ranks.device)
    rows = [train_step(state) for _ in range(steps)]
    state.close()
    last = rows[-1]
    peak = torch.cuda.max_memory_allocated(ranks.device) - before
    return {"peak": peak, "seconds": last.seconds, "mfu": last.mfu or math.nan}
