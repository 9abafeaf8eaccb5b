"""What the GPU tests run on a rank."""

import copy
import math
import time
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from pipeline.distributed.own_time import OWN_TIME
from pipeline.distributed.process_group import Ranks, forget_earlier_stages
from pipeline.model.backbone import moe_layers
from pipeline.model.moe import MoELayer, experts
from pipeline.model.moe.experts import LocalExperts
from pipeline.model.moe.grouped import can_group, grouped_linear
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


def grouped_calls(ranks: Ranks, tree: dict[str, Any], number: int, folder: Path) -> tuple[int, list[dict[str, float]]]:
    """How many projections one kernel computed for all experts of a layer in a step, and the steps' losses."""
    calls: list[None] = []

    def counted(*arguments: Any) -> Tensor:
        calls.append(None)
        return grouped_linear(*arguments)

    state = TrainingState.start(stage_inputs(tree, number, folder, ranks), ranks)
    with patch.object(experts, "grouped_linear", counted):
        rows = [train_step(state)]
        first = len(calls)
    rows += [train_step(state) for _ in range(3)]
    state.close()
    return first, [row.loss for row in rows]


def losses_one_by_one(ranks: Ranks, tree: dict[str, Any], number: int, folder: Path) -> list[dict[str, float]]:
    """The same steps, one expert after another."""
    with patch.object(experts, "can_group", lambda _rows, _weights: False):
        return grouped_calls(ranks, tree, number, folder)[1]


def experts_both_ways(ranks: Ranks, hidden: int, intermediate: int, counts: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Output and gradients of experts in bf16: in one kernel, and one after another in fp32."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=1)
    local = LocalExperts(LlamaMLP(config).bfloat16(), len(counts), len(counts), "ep_size_1")
    for parameter in local.parameters():
        parameter.data.normal_(0, 0.05)
    local = local.to(ranks.device)
    exact = copy.deepcopy(local).float()
    x_AD = torch.randn(sum(counts), hidden, device=ranks.device).bfloat16()
    upstream_AD = torch.randn_like(x_AD)
    assert can_group(x_AD, [expert.gate_up_proj for expert in local.experts])
    found = []
    for module, rows in ((local, x_AD.requires_grad_()), (exact, x_AD.detach().float().requires_grad_())):
        output = torch.cat(module(rows.split(module.batch_sizes(rows, counts)), counts))
        gradients = torch.autograd.grad(output, (rows, *module.parameters()), upstream_AD.to(rows.dtype))
        found.append([tensor.detach().float().cpu() for tensor in (output, *gradients)])
    return list(zip(*found, strict=True))
