"""One training stage, on every rank: load, train, validate, save. Reads top to bottom."""

import signal
import time
from contextlib import closing
from functools import partial
from typing import Any

import torch

from common.errors import AgreedError
from common.progress import progress
from pipeline.checkpoint.store import mark_best
from pipeline.distributed.device import device_name
from pipeline.distributed.process_group import BACKENDS, Ranks, forget_earlier_stages, peak_memory_bytes
from pipeline.distributed.stop_request import StopRequest
from pipeline.model.backbone import moe_layers, parameter_groups
from pipeline.records.metrics import StepRow
from pipeline.training.inputs import StageInputs
from pipeline.training.metrics import MetricsLog
from pipeline.training.profiling import StepProfiler
from pipeline.training.resume import Saves, resume
from pipeline.training.state import TrainingState
from pipeline.training.step import train_step
from pipeline.training.validation import measure_base, validate, validation_is_due

WORTH_SAYING = 0.02  # of a step spent waiting for data


def train_stage(inputs: StageInputs, ranks: Ranks) -> dict[str, Any] | None:
    """Train a stage to its end, or until a signal asks to stop.

    Returns:
        The stage's figures when it is done, see :func:`_figures`; None if it was asked to stop, after a checkpoint.

    Raises:
        AgreedError: too many steps in a row were skipped, or a checkpoint can't be written.
    """
    forget_earlier_stages(ranks.device)
    torch.use_deterministic_algorithms(inputs.run.parallel.deterministic)
    started = time.monotonic()
    state = TrainingState.start(inputs, ranks)
    try:
        return _train(state, started)
    finally:
        state.close()


def _train(state: TrainingState, started: float) -> dict[str, Any] | None:
    """See :func:`train_stage`; ``started`` is when it was called."""
    inputs, ranks, settings, run = state.inputs, state.ranks, state.settings, state.inputs.run
    if run.checkpoint.resume == "auto":
        resume(state)
    measure_base(state)
    _say_start(state)
    log = MetricsLog.open(inputs.folder, state.engine.monitor, list(inputs.plan.moe_layers), state.step, ranks)
    saves = Saves(state)
    total = settings.num_steps * state.batch_tokens
    before = state.step * state.batch_tokens
    bar = progress(total, f"stage {inputs.stage.number}", "token", show=ranks.is_first, initial=before)
    profiler = StepProfiler(run.log.profile_steps, inputs.folder, ranks)
    with StopRequest(partial(_answer_signal, state)) as stop, closing(profiler), bar:
        while state.step < settings.num_steps:
            state.at(f"step {state.step + 1}")
            profiler.before(state.step + 1)
            row = train_step(state, bar.update)
            profiler.after(state.step)
            log.step(row)
            bar.set_postfix_str(_short(row), refresh=False)
            if row.skipped:
                state.say(f"step {state.step} skipped: {row.skipped}")
            too_much_forgotten = ""
            if validation_is_due(run.validate_, state.step, settings.num_steps, state.batch_tokens):
                too_much_forgotten = _validate(state, log, saves)
            last, too_many_skipped = state.step == settings.num_steps, state.skipped_steps.too_many()
            stopping, save_due = _any_rank(ranks, stop.requested, saves.due())
            must_be_written = stopping or last or too_many_skipped or bool(too_much_forgotten)
            if save_due or must_be_written:
                saves.save(must_be_written=must_be_written)
            if too_many_skipped or too_much_forgotten:
                raise AgreedError(too_much_forgotten or _skipped_steps_line(state, row))
            if stopping and not last:
                state.say(f"stopped by a signal after {state.step} steps; run the same command again to resume")
                return None
    return _figures(state, log, saves, time.monotonic() - started)


def _answer_signal(state: TrainingState, number: int) -> None:
    """Say at once what a signal that asks to stop leads to."""
    state.ranks.stopping()
    left = state.seconds_left
    about = "" if left is None else f", about {left / 60:.0f} min" if left >= 90 else f", about {left:.0f} s"
    again = "; again to end now" if number != signal.SIGUSR1 else ""  # SLURM sends that one, not a person
    state.say(f"stopping after this step{about}{again}")


def _validate(state: TrainingState, log: MetricsLog, saves: Saves) -> str:
    """Score, and save and mark a checkpoint if it is the best so far.

    Returns:
        Why training has to stop; empty if it does not.
    """
    row = validate(state)
    log.validation(row)
    if row.best and saves.save() and state.ranks.is_first:
        mark_best(state.inputs.folder, state.tag, row.mean)
    if not row.forgotten:
        return ""
    worse = ", ".join(f"{name} {percent:+.1f} %" for name, percent in row.forgotten.items())
    state.say(f"warning: after step {state.step} worse than the base model, beyond the interval: {worse}")
    limit = state.inputs.run.validate_.stop_if_forgetting
    if limit is None or max(row.forgotten.values()) <= limit:
        return ""
    return (
        f"stage {state.stage.number}: {worse} against the base model, more than validate.stop_if_forgetting="
        f"{limit:g}; stopped after step {state.step}, a checkpoint is saved. Lower lr, or raise the limit to resume"
    )


def _any_rank(ranks: Ranks, *flags: bool) -> list[bool]:
    """Each flag is true on all ranks if it is true on one: clocks and signals differ from rank to rank."""
    return [bool(value) for value in ranks.sum(torch.tensor([float(flag) for flag in flags], device=ranks.device))]


def _skipped_steps_line(state: TrainingState, row: StepRow) -> str:
    return (
        f"stage {state.stage.number}: {state.inputs.run.bad_steps.stop_after} steps in a row were skipped, "
        f"the last because {row.skipped}; stopped after step {state.step}, a checkpoint is saved. "
        "Lower lr, look at the data of these steps, or change bad_steps"
    )


def _figures(state: TrainingState, log: MetricsLog, saves: Saves, seconds: float) -> dict[str, Any]:
    """What the stage's manifest says of it.

    ``tag`` (its last checkpoint), ``steps``, ``tokens``, ``training_seconds`` (of the steps alone),
    ``tokens_per_second`` and ``skipped_steps`` are of the whole stage; ``seconds``, ``saves`` and ``save_seconds`` of
    this session; ``peak_memory_gb`` of all ranks together. ``epochs`` says how often each source is read.
    """
    training_seconds = log.training_seconds()
    memory = torch.tensor([float(peak_memory_bytes(state.ranks.device))], device=state.ranks.device)
    tokens = state.progress["tokens"]
    return {
        "tag": state.saved_tag,
        "steps": state.step,
        "tokens": tokens,
        "seconds": seconds,
        "training_seconds": training_seconds,
        "tokens_per_second": tokens / max(training_seconds, 1e-9),
        "peak_memory_gb": float(state.ranks.sum(memory)) / 1e9,
        "ranks": state.dims.world_size,
        "ep_size": state.dims.ep_size,
        "micro_batch_size": state.shape.micro_batch,
        "epochs": state.order.epochs(),
        "skipped_steps": state.skipped_steps.count,
        "saves": saves.count,
        "save_seconds": saves.seconds,
    }


def _say_start(state: TrainingState) -> None:
    """Two lines: what ranks compute on, and how; steps, batch, ranks, what trains, epochs."""
    settings, shape = state.settings, state.shape
    trained = trained_parameters(state)
    dtype = str(state.engine.module.dtype).removeprefix("torch.")
    state.say(f"{device_name(state.ranks.device)}, {BACKENDS[state.ranks.device.type]}, {dtype}")
    epochs = ", ".join(f"{name} {value:.2f}" for name, value in state.order.epochs().items())
    state.say(
        f"{settings.num_steps} steps of {settings.global_batch_size} x {settings.sequence_length} tokens"
        f" on {state.dims.world_size} ranks (ep_size {state.dims.ep_size}, micro-batch "
        f"{shape.micro_batch} x {shape.accumulation}); {trained / 1e6:.1f} M "
        f"parameters train; epochs: {epochs}"
    )


def trained_parameters(state: TrainingState) -> int:
    """How many parameters train, each counted once, however many ranks hold it. All ranks must call this."""
    trained = torch.zeros((), dtype=torch.int64, device=state.ranks.device)
    groups = parameter_groups(state.engine.module)
    shared = [parameter for group in groups if "moe" not in group for parameter in group["params"]]
    trained += sum(parameter.numel() for parameter in shared) * state.ranks.is_first
    for layer in moe_layers(state.engine.module):
        experts = layer.local_experts.parameters() if layer.dims.edp_rank == 0 else ()
        trained += sum(parameter.numel() for parameter in experts if parameter.requires_grad)
    return int(state.ranks.sum(trained))


def _short(row: StepRow) -> str:
    """A row of metrics for the progress bar."""
    losses = " ".join(f"{name} {value:.3f}" for name, value in row.loss.items() if value)
    waits = row.data_seconds / row.seconds
    mfu = "" if row.mfu is None else f" mfu {row.mfu:.0%}"
    data = f" waiting for data {waits:.0%}" if waits > WORTH_SAYING else ""
    slowest = "" if row.slowest_rank is None else f" slowest {row.slowest_rank.name} {row.slowest_rank.percent:+.0f} %"
    return f"{losses} lr {row.lr:.1e} grad {row.grad_norm:.2f}{mfu}{data}{slowest}"
