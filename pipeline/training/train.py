"""One training stage, on every rank: load, train, validate, save. Reads top to bottom."""

import time
from typing import Any

import torch

from common.errors import AgreedError
from common.progress import progress
from pipeline import checkpoint
from pipeline.config.run import RunConfig
from pipeline.distributed.process_group import Ranks, StopRequest, peak_memory_bytes
from pipeline.training.metrics import MetricsLog
from pipeline.training.trainer import StageInputs, Trainer


def train_stage(inputs: StageInputs, ranks: Ranks) -> dict[str, Any] | None:
    """Train a stage to its end, or until a signal asks to stop.

    Returns:
        The stage's figures when it is done; None when it was asked to stop (a checkpoint is saved).

    Raises:
        AgreedError: too many steps in a row were bad, or a checkpoint can't be written.
    """
    run, stage = inputs.run, inputs.stage
    started = time.monotonic()
    trainer = Trainer(inputs, ranks)
    if run.checkpoint.resume == "auto":
        trainer.resume()
    _say_start(trainer)
    log = MetricsLog.open(inputs.folder, trainer.engine.monitor, list(inputs.plan.moe_layers), trainer.step, ranks)
    saves = Saves(trainer)
    bar = progress(stage.num_steps * trainer.batch_tokens, f"stage {inputs.number}", "token", show=ranks.is_first)
    with StopRequest() as stop, bar:
        bar.update(trainer.step * trainer.batch_tokens)
        while trainer.step < stage.num_steps:
            ranks.at(f"stage {inputs.number}, step {trainer.step + 1}")
            row = trainer.train_step()
            last = trainer.step == stage.num_steps
            log.step(row)
            bar.set_postfix_str(_short(row), refresh=False)
            bar.update(trainer.batch_tokens)
            if row["skipped"]:
                ranks.say(f"stage {inputs.number}: step {trainer.step} skipped: {row['skipped']}")
            if _validation_due(run, stage.num_steps, trainer.step, trainer.batch_tokens):
                _validate(trainer, log, saves)
            stopping, save_due = _agree(ranks, stop.requested, saves.due())
            gives_up = trainer.guard.gives_up()
            if save_due or stopping or last or gives_up:
                saves.save(must_be_written=stopping or last or gives_up)
            if gives_up:
                raise AgreedError(_bad_steps_line(trainer, row))
            if stopping and not last:
                ranks.say(f"stage {inputs.number}: stopped by a signal after {trainer.step} steps; run again to go on")
                return None
    return _figures(trainer, log, saves, time.monotonic() - started)


class Saves:
    """When checkpoints are saved, and what they cost."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.seconds = 0.0
        self.count = 0
        self.last = time.monotonic()

    def due(self) -> bool:
        """Whether the settings want a checkpoint now; ranks' clocks differ, so that they must agree."""
        settings = self.trainer.inputs.run.checkpoint
        by_step = settings.every_steps is not None and self.trainer.step % settings.every_steps == 0
        minutes = (time.monotonic() - self.last) / 60
        return by_step or (settings.every_minutes is not None and minutes >= settings.every_minutes)

    def save(self, *, must_be_written: bool = False) -> bool:
        """Save unless this step's checkpoint is there already; false if it can't be written and that is allowed."""
        trainer, ranks = self.trainer, self.trainer.ranks
        ranks.at(f"stage {trainer.inputs.number}, saving after step {trainer.step}")
        self.last = time.monotonic()
        try:
            figures = trainer.save()
        except AgreedError as error:
            if must_be_written or trainer.inputs.run.checkpoint.if_full == "stop":
                raise
            ranks.say(f"stage {trainer.inputs.number}: warning: {error}; training goes on (checkpoint.if_full)")
            return False
        if figures is not None:
            self.count += 1
            self.seconds += figures["seconds"]
            ranks.say(
                f"stage {trainer.inputs.number}: saved {trainer.tag}, {figures['gigabytes']:.2f} GB in "
                f"{figures['seconds']:.1f} s"
            )
        return True


def _validate(trainer: Trainer, log: MetricsLog, saves: Saves) -> None:
    """Score, and keep the checkpoint if it is the best so far."""
    row = trainer.validate()
    log.validation(row)
    if row["best"] and saves.save() and trainer.ranks.is_first:
        checkpoint.mark_best(trainer.inputs.folder, trainer.tag, row["mean"])


def _bad_steps_line(trainer: Trainer, row: dict[str, Any]) -> str:
    return (
        f"stage {trainer.inputs.number}: {trainer.inputs.run.bad_steps.stop_after} steps in a row were skipped, "
        f"the last because {row['skipped']}; stopped after step {trainer.step}, a checkpoint is saved. "
        "Lower lr, look at the data of these steps, or change bad_steps"
    )


def _figures(trainer: Trainer, log: MetricsLog, saves: Saves, seconds: float) -> dict[str, Any]:
    """What the stage's manifest says it took; ``seconds`` is of this session, the speed is of the whole stage."""
    training_seconds = log.training_seconds()
    memory = torch.tensor([float(peak_memory_bytes(trainer.ranks.device))], device=trainer.ranks.device)
    return {
        "tag": trainer.saved_tag,
        "steps": trainer.step,
        "tokens": trainer.step * trainer.batch_tokens,
        "seconds": seconds,
        "training_seconds": training_seconds,
        "tokens_per_second": trainer.step * trainer.batch_tokens / max(training_seconds, 1e-9),
        "peak_memory_gb": float(trainer.ranks.sum(memory)) / 1e9,
        "ranks": trainer.ranks.world_size,
        "ep_size": trainer.inputs.run.parallel.ep_size,
        "micro_batch_size": trainer.shape.micro_batch,
        "epochs": trainer.order.epochs(),
        "skipped_steps": trainer.guard.skipped,
        "saves": saves.count,
        "save_seconds": saves.seconds,
    }


def _validation_due(run: RunConfig, num_steps: int, step: int, batch_tokens: int) -> bool:
    """Every so many tokens and at the end, but not just before the end."""
    if run.validate_.every_tokens is None:
        return False
    every = max(1, run.validate_.every_tokens // batch_tokens)
    return step == num_steps or (step % every == 0 and num_steps - step >= every / 2)


def _agree(ranks: Ranks, *flags: bool) -> list[bool]:
    """Each flag is true for all ranks if it is for one: clocks and signals differ."""
    return [bool(value) for value in ranks.sum(torch.tensor([float(flag) for flag in flags], device=ranks.device))]


def _say_start(trainer: Trainer) -> None:
    inputs, ranks, stage = trainer.inputs, trainer.ranks, trainer.stage
    trained = torch.tensor([0, 0], dtype=torch.int64, device=ranks.device)
    for parameter in trainer.engine.module.parameters():
        if parameter.requires_grad:
            trained[int(hasattr(parameter, "allreduce"))] += parameter.numel()
    experts = int(ranks.sum(trained.clone())[1]) // max(1, ranks.world_size // inputs.run.parallel.ep_size)
    epochs = ", ".join(f"{name} {value:.2f}" for name, value in trainer.order.epochs().items())
    ranks.say(
        f"stage {inputs.number}: {stage.num_steps} steps of {stage.global_batch_size} x {stage.sequence_length} tokens"
        f" on {ranks.world_size} ranks (ep_size {inputs.run.parallel.ep_size}, micro-batch "
        f"{trainer.shape.micro_batch} x {trainer.shape.accumulation}); {(int(trained[0]) + experts) / 1e6:.1f} M "
        f"parameters train; epochs: {epochs}"
    )


def _short(row: dict[str, Any]) -> str:
    losses = " ".join(f"{name} {value:.3f}" for name, value in row["loss"].items() if value)
    return f"{losses} lr {row['lr']:.1e} grad {row['grad_norm']:.2f}"
