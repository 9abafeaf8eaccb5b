"""Stage 1 through DeepSpeed's engine on one rank: its time against a plain loop's, its memory against its needs."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.measuring import DTYPES, PeakMemory, Taken, Turn, anonymous_memory, in_turns
from benchmarks.step_models import Bench, Contender, Sizes, as_routed, floor, ours, trained_parameters
from benchmarks.step_run import run_config, start_stage1
from pipeline.method.stage import GlobalBatch, MicroBatch
from pipeline.method.stages import find_stage
from pipeline.model.moe import collect_routings
from pipeline.training.state import TrainingState
from pipeline.training.step import train_step

STEPS_OF_MEMORY = 3


class PlainAdamW:
    """The least that an AdamW step must do for weights: torch's fused one; bf16 weights have masters in fp32.

    Args:
        parameters: those that train, with their gradients in place when :meth:`step` is called.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.low = [p for p in parameters if p.dtype != torch.float32]
        self.masters = [nn.Parameter(p.detach().float()) for p in self.low]
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        in_fp32 = [p for p in parameters if p.dtype == torch.float32]
        self.optimizer = torch.optim.AdamW([*self.masters, *in_fp32], lr=1e-6, fused=True)

    @torch.no_grad()
    def step(self) -> None:
        """Change the weights."""
        for master, weight in zip(self.masters, self.low, strict=True):
            assert master.grad is not None and weight.grad is not None
            master.grad.copy_(weight.grad)
        self.optimizer.step()
        for master, weight in zip(self.masters, self.low, strict=True):
            weight.copy_(master)


def copies_with_gradients(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """Parameters of the same shapes, with random gradients that stay."""
    copies = [nn.Parameter(p.detach().clone()) for p in parameters]
    for copy in copies:
        copy.grad = torch.randn_like(copy) * 1e-3
    return copies


def forward_backward(state: TrainingState, bench: Bench) -> None:
    """A micro-step through the engine, on samples that lie ready, without the metrics of train_step."""
    batch = GlobalBatch(bench.batch.samples, bench.batch.sequence_length, 0)
    with collect_routings(state.engine.module) as routings:
        logits_BLV = state.engine(input_ids=bench.ids_BL, use_cache=False).logits
    all_T, new_T = torch.ones_like(bench.group_T, dtype=torch.bool), torch.ones_like(bench.group_T)
    micro = MicroBatch(logits_BLV, routings, bench.labels_BL, all_T, new_T, batch.samples, 1)
    losses = state.stage.losses(micro, batch)
    state.engine.backward(torch.stack([weight * loss for loss, weight in losses.values()]).sum())


def step_times(bench: Bench, state: TrainingState, rounds: int, label: str) -> dict[str, list[Taken]]:
    """What each counted round took, by row."""
    least = floor(bench, "floor", "one MLP")
    mine = ours(bench, "ours", "floor", find_stage(state.inputs.run, 1), 0)
    routed = as_routed(bench, "routed", "floor", mine)
    adam = PlainAdamW(copies_with_gradients(trained_parameters(mine)))

    def turn(contender: Contender, *after: Callable[[], object]) -> Turn:
        run, prepare = bench.turn(contender)

        def both() -> None:
            run()
            for action in after:
                action()

        return Turn(f"{contender.name}+{len(after)}", {"": both}, prepare)

    turns = [
        turn(least),
        turn(least, adam.step),
        turn(routed, adam.step),
        turn(mine),
        Turn("adam", {"": adam.step}),
        Turn("engine", {"both": partial(forward_backward, state, bench), "step": state.engine.step}),
        Turn("train_step", {"": partial(train_step, state)}),
    ]
    times = in_turns(turns, rounds, bench.device, label)
    return {
        "floor: forward + backward": times["floor+0"][""],
        "floor with plain AdamW": times["floor+1"][""],
        "the same with rows as routed": times["routed+1"][""],
        "plain AdamW alone": times["adam"][""],
        "ours: forward + backward, no engine": times["ours+0"][""],
        "ours: forward + backward, engine": times["engine"]["both"],
        "ours: the engine's optimizer step": times["engine"]["step"],
        "ours: the whole train_step": times["train_step"][""],
    }


@dataclass(frozen=True)
class Memory:
    """What stage 1 holds at its peak, and what it needs, in bytes.

    Attributes:
        peak: growth of the process over three whole steps, model and engine included.
        weights: the model's, and fp32 masters of those that train in bf16.
        gradients: one in fp32 per weight that trains.
        moments: two in fp32 per weight that trains.
        activations: what the floor keeps for its backward.
    """

    peak: int
    weights: int
    gradients: int
    moments: int
    activations: int

    @property
    def needed(self) -> int:
        """The sum of what is needed."""
        return self.weights + self.gradients + self.moments + self.activations


def memory(sizes: Sizes, dtype: str, folder: Path) -> Memory:
    """Measured in a process of its own, whose memory nothing else has touched."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_memory, sizes, dtype, folder).result()


def _memory(sizes: Sizes, dtype: str, folder: Path) -> Memory:
    from pipeline.distributed.process_group import join, leave

    ranks = join()
    on_gpu = ranks.device.type == "cuda"
    before = anonymous_memory()
    state = start_stage1(sizes, run_config(sizes, dtype, 1, folder), folder, 1, ranks)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(ranks.device)
    with PeakMemory() as growth:
        for _ in range(STEPS_OF_MEMORY):
            train_step(state)
    peak = torch.cuda.max_memory_allocated(ranks.device) if on_gpu else growth.before + growth.peak - before
    parameters = list(state.engine.module.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    masters = sum(4 * p.numel() for p in parameters if p.requires_grad and p.dtype != torch.float32)
    weights = sum(p.numel() * p.element_size() for p in parameters) + masters
    state.close()
    bench = Bench(sizes, DTYPES[dtype], ranks.device)
    kept = kept_bytes(bench, floor(bench, "floor", "one MLP"))
    leave()
    return Memory(int(peak), weights, 4 * trained, 8 * trained, kept)


def kept_bytes(bench: Bench, contender: Contender) -> int:
    """Bytes that a forward keeps for its backward, parameters and buffers left out; each storage counts once."""
    bench.install(contender.blocks)
    known = {
        _storage(t) for module in (bench.model, contender.blocks) for t in (*module.parameters(), *module.buffers())
    }
    kept: dict[int, int] = {}
    alive: list[Any] = []  # so that no storage is freed and its address taken by another

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in known:
            alive.append(tensor)
            kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        bench.losses(contender.stage)
    return sum(kept.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
