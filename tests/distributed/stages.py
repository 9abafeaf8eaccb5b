"""What the distributed tests run on each rank: stages of a tiny run through the product's own training."""

import io
import os
import signal
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from deepspeed.utils import safe_get_full_grad

import common.progress
from common.errors import UserError
from pipeline.checkpoint.store import save_checkpoint
from pipeline.checkpoint.weights import local_expert_names
from pipeline.config.run import RunConfig
from pipeline.distributed.process_group import Ranks
from pipeline.estimate.divide import divide
from pipeline.evaluation.checkpoints import Scored, load_model
from pipeline.method.stages import STAGES, find_stage
from pipeline.model.backbone import moe_layers
from pipeline.records.metrics import StepRow
from pipeline.records.step_manifest import StepInputs
from pipeline.run.context import RunContext
from pipeline.run.runner import finish_step
from pipeline.run.steps import step_named
from pipeline.training import train
from pipeline.training.inputs import StageInputs
from pipeline.training.resume import manifest_of, resume, save
from pipeline.training.state import TrainingState
from pipeline.training.step import train_step
from pipeline.training.train import train_stage
from tests.helpers.rows import TIMING
from tests.helpers.tiny import parse_run

Advance = Callable[[int], object]


def stage_inputs(
    tree: dict[str, Any], number: int, folder: Path, ranks: Ranks, stage1: Path | None = None
) -> StageInputs:
    """The inputs of a stage whose checkpoints go to ``folder``; stage 2 starts as upcycled, or from ``stage1``."""
    run: RunConfig = parse_run(tree, "tiny.yaml")
    context = RunContext(run)
    stage = find_stage(run, number)
    identity = context.identity(run.stage_numbers[-1])
    done_with = StepInputs(inputs={}, run={})
    dims = divide(run, ranks)
    return StageInputs(
        run, stage, context.plan, context.store, context.untrained, folder, identity, done_with, dims, stage1
    )


def canonical(model: torch.nn.Module, tensor_of: Any) -> dict[str, torch.Tensor]:
    """Tensors of this rank's parameters by name, experts under their numbers in the model."""
    prefixes = {prefix: (layer, number) for (layer, number), prefix in local_expert_names(model).items()}
    result = {}
    for name, parameter in model.named_parameters():
        tensor = tensor_of(parameter)
        if tensor is None:
            continue
        prefix, _, last = name.rpartition(".")
        layer = prefixes.get(prefix)
        result[name if layer is None else f"expert {layer} {last}"] = tensor.detach().clone()
    return result


def train_steps(
    ranks: Ranks,
    tree: dict[str, Any],
    number: int,
    folder: Path,
    steps: int,
    save_at: int | None = None,
    resumes: bool = False,
    stage1: Path | None = None,
) -> dict[str, Any]:
    """Take optimizer steps; returns rows of metrics, the first step's gradients, weights, and what was frozen."""
    state = TrainingState.start(stage_inputs(tree, number, folder, ranks, stage1), ranks)
    if resumes:
        resume(state)
    frozen = {n: p.detach().clone() for n, p in state.engine.module.named_parameters() if not p.requires_grad}
    gradients: dict[str, torch.Tensor] = {}
    if state.step == 0:
        _record_gradients(state, gradients)
    rows = []
    while state.step < steps:
        rows.append(train_step(state).model_dump())
        if state.step == save_at:
            save(state)
    model = state.engine.module
    unchanged = all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    for row in rows:
        for key in TIMING:
            del row[key]
    result = {
        "rows": rows,
        "gradients": gradients,
        "weights": canonical(model, lambda p: p if p.requires_grad else None),
        "frozen_unchanged": unchanged,
        "frozen": sorted(frozen),
        "trained": sorted(canonical(model, lambda p: p if p.requires_grad else None)),
        "optimizer": _moments(state),
        "biases": selection_biases(model),
    }
    state.close()
    return result


def selection_biases(model: torch.nn.Module) -> list[torch.Tensor]:
    """Copies of the routers' selection biases, in the order of the layers; without those that have none."""
    biases = [layer.router.selection_bias for layer in moe_layers(model)]
    return [bias.clone() for bias in biases if bias is not None]


def biases_to_score(ranks: Ranks, tree: dict[str, Any], folder: Path) -> list[torch.Tensor]:
    """The selection biases of a checkpoint's model as evaluation loads it."""
    inputs = stage_inputs(tree, 1, folder.parent, ranks)
    scored = Scored("stage1", (folder,), {})
    return selection_biases(load_model(scored, inputs.untrained, torch.float32, inputs.dims, ranks.device))


def _record_gradients(state: TrainingState, into: dict[str, torch.Tensor]) -> None:
    """Copy the first step's reduced, unclipped gradients just before the engine's first optimizer step."""
    step, calls = state.engine.step, []

    def recording_step(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == state.shape.accumulation:
            get = safe_get_full_grad if state.stage.uses_zero else (lambda p: p.grad)
            into.update(canonical(state.engine.module, lambda p: get(p) if p.requires_grad else None))
        return step(*arguments, **options)

    state.engine.step = recording_step


def _moments(state: TrainingState) -> list[torch.Tensor]:
    """The optimizer's moments and fp32 weights on this rank."""
    optimizer = state.engine.basic_optimizer
    tensors = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            tensors.append(parameter.detach().float().clone())
            moments = optimizer.state.get(parameter, {})  # there are none before the first step
            tensors += [moments[key].clone() for key in ("exp_avg", "exp_avg_sq") if key in moments]
    return tensors


def train_to_the_end(
    ranks: Ranks, tree: dict[str, Any], number: int, folder: Path, term_at: int | None = None
) -> dict[str, Any] | None:
    """The product's whole loop; where asked to, rank 1 gets a SIGTERM during a step."""

    def step_with_signal(state: TrainingState, advance: Advance) -> StepRow:
        if state.step + 1 == term_at and ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(state, advance)

    train.train_step = step_with_signal
    try:
        return train_stage(stage_inputs(tree, number, folder, ranks), ranks)
    finally:
        train.train_step = train_step


def lines_of_progress(
    ranks: Ranks, tree: dict[str, Any], number: int, folder: Path, term_at: int | None = None
) -> list[str]:
    """What rank 0's progress bar says in a log: a line after each micro-step, and one when it closes."""
    seconds = {"SECONDS_BETWEEN_LINES": 0.0, "SECONDS_WORTH_A_LINE": 0.0}
    with patch.multiple(common.progress, **seconds), redirect_stdout(io.StringIO()) as printed:
        train_to_the_end(ranks, tree, number, folder, term_at)
    return [line for line in printed.getvalue().splitlines() if " tokens, " in line]


def train_a_step_of(ranks: Ranks, tree: dict[str, Any], force: bool) -> str:
    """The run's stage 1 is asked to stop in the step it takes next; returns what rank 0 printed."""

    def step_with_signal(state: TrainingState, advance: Advance) -> StepRow:
        os.kill(os.getpid(), signal.SIGTERM)
        return train_step(state, advance)

    context = RunContext(parse_run(tree, "x"), force=force)
    train.train_step = step_with_signal
    try:
        with redirect_stdout(io.StringIO()) as printed:
            assert not finish_step(context, step_named("stage1"), ranks)
    finally:
        train.train_step = train_step
    return printed.getvalue()


def with_parallel(tree: dict[str, Any], **parallel: Any) -> dict[str, Any]:
    """The same run, otherwise spread."""
    return {**tree, "parallel": parallel}


def move_and_train(
    ranks: Ranks, tree: dict[str, Any], number: int, source: Path, target: Path, steps: int
) -> list[dict[str, Any]]:
    """Resume from the checkpoint in ``source`` on these ranks, save at once in ``target``, then train on."""
    state = TrainingState.start(stage_inputs(tree, number, source, ranks), ranks)
    resume(state)
    save_checkpoint(state.engine, target, state.tag, manifest_of(state), keep=1)
    rows = [train_step(state).model_dump() for _ in range(state.step, steps)]
    state.close()
    return rows


def train_with_bad_steps(
    ranks: Ranks, tree: dict[str, Any], number: int, folder: Path, factors: dict[int, float]
) -> dict[str, Any] | str:
    """The product's loop, with rank 1's loss multiplied at some steps; weights before and after each step.

    Returned is the error's text where the run stops.
    """
    kind = STAGES[number]
    real_losses = kind.losses
    weights: list[dict[str, torch.Tensor]] = []
    biases: list[list[torch.Tensor]] = []
    moments: list[list[torch.Tensor]] = []
    current = [0]

    def losses(self: Any, *arguments: Any) -> Any:
        result = real_losses(self, *arguments)
        factor = factors.get(current[0], 1.0) if ranks.rank == 1 else 1.0
        return {name: (loss * factor, weight) for name, (loss, weight) in result.items()}

    def step(state: TrainingState, advance: Advance) -> StepRow:
        current[0] = state.step + 1
        row = train_step(state, advance)
        weights.append(canonical(state.engine.module, lambda p: p if p.requires_grad else None))
        moments.append(_moments(state))
        biases.append(selection_biases(state.engine.module))
        return row

    kind.losses, train.train_step = losses, step  # type: ignore[method-assign]
    try:
        figures = train_stage(stage_inputs(tree, number, folder, ranks), ranks)
    except UserError as error:
        return str(error)
    finally:
        kind.losses, train.train_step = real_losses, train_step  # type: ignore[method-assign]
    return {"figures": figures, "weights": weights, "moments": moments, "biases": biases}
