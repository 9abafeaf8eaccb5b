"""What the distributed tests run on each rank: stages of a tiny run through the product's own training."""

import gc
import io
import os
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.utils import groups, safe_get_full_grad

import common.progress
from common.errors import UserError
from common.files import sha256_file
from pipeline.checkpoint import verify, weights
from pipeline.checkpoint.store import read_files, save_checkpoint
from pipeline.checkpoint.tensors import load_tensors
from pipeline.checkpoint.weights import local_expert_names
from pipeline.config.run import RunConfig
from pipeline.distributed.process_group import Ranks, forget_earlier_stages
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
    identity = context.identity(2)
    done_with = StepInputs(inputs={}, run={})
    dims = divide(run, ranks)
    return StageInputs(
        run, stage, context.plan, context.store, context.upcycled, folder, identity, done_with, dims, stage1
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
    return selection_biases(load_model(scored, inputs.upcycled, inputs.plan, torch.float32, inputs.dims, ranks.device))


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


def first_logits(ranks: Ranks, tree: dict[str, Any], number: int, folder: Path) -> torch.Tensor:
    """The untrained model's logits on samples that are the same on all ranks, gathered from rank 0."""
    state = TrainingState.start(stage_inputs(tree, number, folder, ranks), ranks)
    ids = torch.from_numpy(state.order.batch(0, 4).ids)
    state.engine.module.eval()
    with torch.no_grad():
        logits = state.engine.module(input_ids=ids, use_cache=False).logits
    state.close()
    return logits.clone()


def load_with_deepspeeds_own_engine(ranks: Ranks, tree: dict[str, Any], folder: Path) -> list[str]:
    """Zero all weights, load the upcycled checkpoint as DeepSpeed alone would; names that differ from ours."""
    state = TrainingState.start(stage_inputs(tree, 1, folder, ranks), ranks)
    expected = {name: p.detach().clone() for name, p in state.engine.module.named_parameters()}
    with torch.no_grad():
        for parameter in state.engine.module.parameters():
            parameter.zero_()
    state.engine.checkpoint_engine = TorchCheckpointEngine(state.engine._config)
    path, _ = state.engine.load_checkpoint(str(state.inputs.upcycled), load_module_only=True)
    assert path is not None
    parameters = state.engine.module.named_parameters()
    different = [name for name, parameter in parameters if not torch.equal(parameter, expected[name])]
    state.close()
    return different


def kernels_are_deterministic(ranks: Ranks, tree: dict[str, Any], number: int, folder: Path) -> list[bool]:
    """Train a stage; whether torch was to take deterministic kernels, in each step."""
    found: list[bool] = []

    def asking(state: TrainingState, advance: Advance) -> StepRow:
        found.append(torch.are_deterministic_algorithms_enabled())
        return train_step(state, advance)

    with patch.object(train, "train_step", asking):
        train_stage(stage_inputs(tree, number, folder, ranks), ranks)
    return found


def files_read(ranks: Ranks, tree: dict[str, Any], number: int, folder: Path) -> dict[str, Any]:
    """Names of the files that this rank verifies and loads at a stage's start, and the weights that it then has."""
    hashed: list[str] = []
    loaded: list[str] = []

    def hashing(path: Path) -> str:
        hashed.append(path.name)
        return sha256_file(path)

    def loading(path: Path) -> Any:
        loaded.append(path.name)
        return load_tensors(path)

    with patch.object(verify, "sha256_file", hashing), patch.object(weights, "load_tensors", loading):
        state = TrainingState.start(stage_inputs(tree, number, folder, ranks), ranks)
    held = canonical(state.engine.module, lambda parameter: parameter)
    state.close()
    return {"hashed": hashed, "loaded": loaded, "weights": held}


def expert_timeouts(ranks: Ranks, tree: dict[str, Any], number: int, folder: Path) -> list[timedelta]:
    """The time-outs of this rank's group, and of the two groups of its experts."""
    state = TrainingState.start(stage_inputs(tree, number, folder, ranks), ranks)
    name = state.dims.expert_group_name
    found = [None, groups._get_expert_parallel_group(name), groups._get_expert_data_parallel_group(name)]
    state.close()
    backends = [(group or torch.distributed.group.WORLD)._get_backend(ranks.device) for group in found]
    return [backend.options._timeout for backend in backends]


def summed_over_ranks(ranks: Ranks, tree: dict[str, Any], number: int, folder: Path) -> dict[torch.dtype, int]:
    """How many numbers of each type are all-reduced in a step."""
    state, summed = TrainingState.start(stage_inputs(tree, number, folder, ranks), ranks), Counter[torch.dtype]()
    all_reduce = torch.distributed.all_reduce

    def counting(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        summed[tensor.dtype] += tensor.numel()
        return all_reduce(tensor, *arguments, **options)

    with patch("torch.distributed.all_reduce", counting):
        train_step(state)
    state.close()
    return dict(summed)


def exchanges(ranks: Ranks, tree: dict[str, Any], number: int, folder: Path) -> int:
    """How many all-to-alls a step takes."""
    state, sizes = TrainingState.start(stage_inputs(tree, number, folder, ranks), ranks), []
    all_to_all = torch.distributed.all_to_all_single

    def counting(output: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        sizes.append(output.numel())
        return all_to_all(output, *arguments, **options)

    with patch("torch.distributed.all_to_all_single", counting):
        train_step(state)
    state.close()
    return len(sizes)


def engines_left(ranks: Ranks, tree: dict[str, Any], number: int, folder: Path) -> int:
    """How many more of DeepSpeed's engines there are after a stage than before it."""

    def engines() -> int:
        forget_earlier_stages(ranks.device)
        return sum(type(thing) is DeepSpeedEngine for thing in gc.get_objects())

    before = engines()
    train_to_the_end(ranks, tree, number, folder)
    return engines() - before


def count_experts(ranks: Ranks, tree: dict[str, Any], folder: Path) -> list[int]:
    """Experts on this rank, a layer with a router."""
    state = TrainingState.start(stage_inputs(tree, 1, folder, ranks), ranks)
    counts = [len(layer.local_numbers) for layer in moe_layers(state.engine.module)]
    state.close()
    return counts


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


def held_bytes(ranks: Ranks, tree: dict[str, Any], number: int, folder: Path) -> dict[str, int]:
    """What this rank holds after a step, by kind, and what its checkpoint's tensors take."""
    state = TrainingState.start(stage_inputs(tree, number, folder, ranks), ranks)
    train_step(state)
    save(state)
    parameters, optimizer = list(state.engine.module.parameters()), state.engine.basic_optimizer
    states = [value for entry in optimizer.state.values() for value in entry.values() if value.ndim]
    masters = [p for group in optimizer.param_groups for p in group["params"]] if state.stage.uses_zero else []
    sums = getattr(state.engine.optimizer, "fp32_groups_gradients_flat", [])
    held = {
        "weights": sum(p.numel() * p.element_size() for p in parameters),
        "gradients": sum(g.numel() * g.element_size() for g in sums),
        "master weights": sum(p.numel() * p.element_size() for p in masters),
        "moments": sum(s.numel() * s.element_size() for s in states),
        "checkpoint": sum(entry.bytes for entry in read_files(folder / state.tag).values()),
    }
    state.close()
    return held


def optimizer_class(ranks: Ranks, tree: dict[str, Any], folder: Path) -> tuple[str, bool]:
    """DeepSpeed's class of stage 1's optimizer, and whether it keeps its state in the CPU's memory."""
    state = TrainingState.start(stage_inputs(tree, 1, folder, ranks), ranks)
    optimizer = state.engine.optimizer
    state.close()
    return type(optimizer).__name__, bool(getattr(optimizer, "cpu_offload", False))
