"""One optimizer step over one global batch: batch, forward, losses, backward, step, metrics."""

import hashlib
import time
import warnings
from collections.abc import Callable

import torch

from pipeline.distributed.own_time import OWN_TIME
from pipeline.distributed.process_group import peak_memory_bytes
from pipeline.method.stage import GlobalBatch, MicroBatch
from pipeline.model.moe import collect_routings
from pipeline.records.metrics import StepRow
from pipeline.training.metrics import StepSums
from pipeline.training.slowest_rank import find_slowest, own_seconds
from pipeline.training.state import TrainingState


def train_step(state: TrainingState, advance: Callable[[int], object] = lambda _tokens: None) -> StepRow:
    """Take one optimizer step, or skip it; either way ``state.step`` counts it.

    Args:
        state: the stage in training.
        advance: is called after each micro-step with its number of tokens, of all ranks together.

    Returns:
        Its row of metrics, the same on all ranks except for times and memory.
    """
    state.step_started, waited = time.monotonic(), state.samples.waited
    _seed(state)
    batch = _global_batch(state)
    sums = StepSums([source.name for source in state.order.sources], state.inputs.plan, state.ranks.device)
    for micro_step in range(state.shape.accumulation):
        samples = _micro_step(state, micro_step, batch, sums)
        advance(samples * batch.sequence_length)
        if micro_step < state.shape.accumulation - 1:
            state.engine.step()  # counts the micro-step; only the last one updates the weights
    seconds_R = own_seconds(state.ranks)
    summed = state.ranks.sum(torch.cat([sums.pack(), seconds_R])).cpu()
    packed = summed[: -len(seconds_R)]
    figures = sums.read(packed)
    learning_rate = state.engine.get_lr()[0]
    grad_norm, skipped = _optimizer_step(state, sum(figures["loss"].values()))
    if skipped is None:
        state.stage.end_step(state.engine.module, sums.choices_in(packed))
    state.step += 1
    state.step_seconds = seconds = time.monotonic() - state.step_started
    return StepRow(
        **state.progress,
        **figures,
        lr=learning_rate,
        grad_norm=grad_norm,
        skipped=skipped,
        tokens_per_second=state.batch_tokens / seconds,
        memory_gb=peak_memory_bytes(state.ranks.device) / 1e9,
        seconds=seconds,
        data_seconds=state.samples.waited - waited,
        mfu=state.utilization(state.batch_tokens / seconds),
        slowest_rank=find_slowest(summed[-len(seconds_R) :].tolist(), state.hosts),
    )


def _seed(state: TrainingState) -> None:
    """Make random numbers a function of run, stage, step and rank, so that a resumed run draws the same."""
    name = f"{state.inputs.run.seed}/{state.stage.number}/{state.step}/{state.ranks.rank}".encode()
    torch.manual_seed(int.from_bytes(hashlib.sha256(name).digest()[:8], "little"))


def _global_batch(state: TrainingState) -> GlobalBatch:
    samples = state.settings.global_batch_size
    first, order = state.step * samples, state.order
    base_tokens = order.old_tokens(first, samples, of_base=True) if state.stage.protects_base_only else None
    return GlobalBatch(samples, order.sequence_length, order.old_tokens(first, samples), base_tokens)


def _micro_step(state: TrainingState, micro_step: int, batch: GlobalBatch, sums: StepSums) -> int:
    """Forward and backward of one micro-batch; returns the number of samples that count, of all ranks together."""
    size, device, length = state.shape.micro_batch, state.ranks.device, batch.sequence_length
    samples_at_once = state.ranks.world_size * size
    OWN_TIME.begin(device)
    number = state.step * state.shape.accumulation + micro_step
    first, empty = state.samples.places.first(number)
    state.rank_log.samples(state.step + 1, first + empty, size - empty)
    samples = state.samples.take(number)
    counts_T = (torch.arange(size) >= empty).to(device, non_blocking=True).repeat_interleave(length)
    with collect_routings(state.engine.module) as routings:
        logits_BLV = state.engine(**samples.model_inputs(device), use_cache=False).logits
    micro = MicroBatch(
        logits_BLV,
        routings,
        labels_BL=torch.from_numpy(samples.labels).to(device, non_blocking=True),
        counts_T=counts_T,
        group_T=torch.from_numpy(samples.groups).flatten().to(device, non_blocking=True),
        samples=min(samples_at_once, batch.samples - micro_step * samples_at_once),
        world_size=state.ranks.world_size,
    )
    losses = state.stage.losses(micro, batch)
    sums.add_losses({name: loss for name, (loss, _) in losses.items()})
    sources_T = torch.from_numpy(samples.sources).to(device, non_blocking=True).repeat_interleave(length)
    sums.add_routing(routings, torch.where(counts_T, sources_T, -1))
    total = sum(weight * loss for loss, weight in losses.values())
    OWN_TIME.mark()
    # The engine averages over ranks and divides by the accumulation steps; our losses are divided already.
    state.engine.backward(total * state.ranks.world_size * state.shape.accumulation)
    return micro.samples


def _optimizer_step(state: TrainingState, loss: float) -> tuple[float, str | None]:
    """Update the weights unless the step is to be skipped; returns the gradient norm, and why it was skipped."""
    engine = state.engine
    norm = state.stage.gradient_norm(engine.module)
    state.skipped_steps.expect(loss, norm)
    engine.step()
    if norm is None:
        norm = float(engine.get_global_grad_norm())
    if getattr(engine.optimizer, "overflow", False):
        # DeepSpeed has skipped this step and not moved the schedule; ours follows the step's number.
        with warnings.catch_warnings(action="ignore"):  # torch's, if the very first step was skipped
            engine.lr_scheduler.step()
    return norm, state.skipped_steps.record(norm)
