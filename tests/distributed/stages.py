"""What the distributed tests run on each rank: stages of a tiny run through the product's own Trainer."""

import os
import signal
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.utils import safe_get_full_grad

from common.errors import UserError
from pipeline import checkpoint
from pipeline.config.load import parse_run
from pipeline.config.run import RunConfig
from pipeline.distributed.process_group import Ranks
from pipeline.model.backbone import moe_layers
from pipeline.run.steps import Steps
from pipeline.training.train import train_stage
from pipeline.training.trainer import StageInputs, Trainer


def stage_inputs(tree: dict[str, Any], number: int, folder: Path) -> StageInputs:
    """The inputs of a stage whose checkpoints go to ``folder``; stage 2 starts from the upcycled experts."""
    run: RunConfig = parse_run(tree, "tiny.yaml")
    steps = Steps(run)
    identity = {"model": steps.model_hash, "plan": steps.plan.key, "tokenizer": steps.store.tokenizer_key}
    return StageInputs(run, 1 if number == 1 else 2, steps.plan, steps.store, steps.upcycled, folder, identity)


def canonical(model: torch.nn.Module, tensor_of: Any) -> dict[str, torch.Tensor]:
    """Tensors of this rank's parameters by name, experts under their numbers in the model."""
    prefixes = {prefix: (layer, number) for (layer, number), prefix in checkpoint.local_expert_names(model).items()}
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
    resume: bool = False,
) -> dict[str, Any]:
    """Take optimizer steps; returns rows of metrics, the first step's gradients, weights, and what was frozen."""
    trainer = Trainer(stage_inputs(tree, number, folder), ranks)
    if resume:
        trainer.resume()
    frozen = {n: p.detach().clone() for n, p in trainer.engine.module.named_parameters() if not p.requires_grad}
    gradients: dict[str, torch.Tensor] = {}
    if trainer.step == 0:
        _record_gradients(trainer, gradients)
    rows = []
    while trainer.step < steps:
        rows.append(trainer.train_step())
        if trainer.step == save_at:
            trainer.save()
    model = trainer.engine.module
    unchanged = all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    for row in rows:
        for key in ("seconds", "tokens_per_second", "memory_gb"):
            del row[key]
    result = {
        "rows": rows,
        "gradients": gradients,
        "weights": canonical(model, lambda p: p if p.requires_grad else None),
        "frozen_unchanged": unchanged,
        "frozen": sorted(frozen),
        "trained": sorted(canonical(model, lambda p: p if p.requires_grad else None)),
        "optimizer": _moments(trainer),
    }
    trainer.engine.destroy()
    return result


def _record_gradients(trainer: Trainer, into: dict[str, torch.Tensor]) -> None:
    """Copy the first step's reduced, unclipped gradients just before the engine's first optimizer step."""
    step, calls = trainer.engine.step, []

    def recording_step(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == trainer.shape.accumulation:
            get = safe_get_full_grad if trainer.inputs.number == 1 else (lambda p: p.grad)
            into.update(canonical(trainer.engine.module, lambda p: get(p) if p.requires_grad else None))
        return step(*arguments, **options)

    trainer.engine.step = recording_step


def _moments(trainer: Trainer) -> list[torch.Tensor]:
    """The optimizer's moments and fp32 weights on this rank."""
    optimizer = trainer.engine.basic_optimizer
    tensors = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            tensors.append(parameter.detach().float().clone())
            state = optimizer.state.get(parameter, {})  # there is none before the first step
            tensors += [state[key].clone() for key in ("exp_avg", "exp_avg_sq") if key in state]
    return tensors


def train_to_the_end(
    ranks: Ranks, tree: dict[str, Any], number: int, folder: Path, term_at: int | None = None
) -> dict[str, Any] | None:
    """The product's whole loop; where asked to, rank 1 gets a SIGTERM during a step."""
    real_step = Trainer.train_step

    def step_with_signal(self: Trainer) -> dict[str, Any]:
        if self.step + 1 == term_at and ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real_step(self)

    Trainer.train_step = step_with_signal  # type: ignore[method-assign]
    try:
        return train_stage(stage_inputs(tree, number, folder), ranks)
    finally:
        Trainer.train_step = real_step  # type: ignore[method-assign]


def first_logits(ranks: Ranks, tree: dict[str, Any], number: int, folder: Path) -> torch.Tensor:
    """The untrained model's logits on samples that are the same on all ranks, gathered from rank 0."""
    trainer = Trainer(stage_inputs(tree, number, folder), ranks)
    ids = torch.from_numpy(trainer.order.batch(0, 4).ids)
    trainer.engine.module.eval()
    with torch.no_grad():
        logits = trainer.engine.module(input_ids=ids, use_cache=False).logits
    trainer.engine.destroy()
    return logits.clone()


def load_with_deepspeeds_own_engine(ranks: Ranks, tree: dict[str, Any], folder: Path) -> list[str]:
    """Zero all weights, load the upcycled checkpoint as DeepSpeed alone would; names that differ from ours."""
    trainer = Trainer(stage_inputs(tree, 1, folder), ranks)
    expected = {name: p.detach().clone() for name, p in trainer.engine.module.named_parameters()}
    with torch.no_grad():
        for parameter in trainer.engine.module.parameters():
            parameter.zero_()
    trainer.engine.checkpoint_engine = TorchCheckpointEngine(trainer.engine._config)
    path, _ = trainer.engine.load_checkpoint(str(trainer.inputs.upcycled), load_module_only=True)
    assert path is not None
    parameters = trainer.engine.module.named_parameters()
    different = [name for name, parameter in parameters if not torch.equal(parameter, expected[name])]
    trainer.engine.destroy()
    return different


def count_experts(ranks: Ranks, tree: dict[str, Any], folder: Path) -> list[int]:
    """Experts on this rank, a layer with a router."""
    trainer = Trainer(stage_inputs(tree, 1, folder), ranks)
    counts = [len(layer.local_numbers) for layer in moe_layers(trainer.engine.module)]
    trainer.engine.destroy()
    return counts


def with_parallel(tree: dict[str, Any], **parallel: Any) -> dict[str, Any]:
    """The same run, otherwise spread."""
    return {**tree, "parallel": parallel}


def move_and_train(
    ranks: Ranks, tree: dict[str, Any], number: int, source: Path, target: Path, steps: int
) -> list[dict[str, Any]]:
    """Resume from the checkpoint in ``source`` on these ranks, save at once in ``target``, then train on."""
    trainer = Trainer(stage_inputs(tree, number, source), ranks)
    trainer.resume()
    topology = {"ranks": ranks.world_size, "ep_size": trainer.topology.ep_size}
    checkpoint.save_checkpoint(trainer.engine, target, trainer.tag, topology, keep=1)
    rows = [trainer.train_step() for _ in range(trainer.step, steps)]
    trainer.engine.destroy()
    return rows


def train_with_bad_steps(
    ranks: Ranks, tree: dict[str, Any], number: int, folder: Path, factors: dict[int, float]
) -> dict[str, Any] | str:
    """The product's loop, with rank 1's loss multiplied at some steps; weights before and after each step.

    Returned is the error's text where the run gives up.
    """
    real_losses, real_step = Trainer._losses, Trainer.train_step
    weights: list[dict[str, torch.Tensor]] = []
    moments: list[list[torch.Tensor]] = []

    def losses(self: Trainer, *arguments: Any) -> Any:
        result = real_losses(self, *arguments)
        factor = factors.get(self.step + 1, 1.0) if ranks.rank == 1 else 1.0
        return {name: (loss * factor, weight) for name, (loss, weight) in result.items()}

    def step(self: Trainer) -> dict[str, Any]:
        row = real_step(self)
        weights.append(canonical(self.engine.module, lambda p: p if p.requires_grad else None))
        moments.append(_moments(self))
        return row

    Trainer._losses, Trainer.train_step = losses, step  # type: ignore[method-assign]
    try:
        figures = train_stage(stage_inputs(tree, number, folder), ranks)
    except UserError as error:
        return str(error)
    finally:
        Trainer._losses, Trainer.train_step = real_losses, real_step  # type: ignore[method-assign]
    return {"figures": figures, "weights": weights, "moments": moments}


def held_bytes(ranks: Ranks, tree: dict[str, Any], number: int, folder: Path) -> dict[str, int]:
    """What this rank holds after a step, by kind, and what its checkpoint's tensors take."""
    trainer = Trainer(stage_inputs(tree, number, folder), ranks)
    trainer.train_step()
    trainer.save()
    parameters, optimizer = list(trainer.engine.module.parameters()), trainer.engine.basic_optimizer
    states = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    masters = [p for group in optimizer.param_groups for p in group["params"]] if number == 1 else []
    sums = getattr(trainer.engine.optimizer, "fp32_groups_gradients_flat", [])
    held = {
        "weights": sum(p.numel() * p.element_size() for p in parameters),
        "gradients": sum(g.numel() * g.element_size() for g in sums),
        "master weights": sum(p.numel() * p.element_size() for p in masters),
        "moments": sum(s.numel() * s.element_size() for s in states),
        "checkpoint": sum(
            entry["bytes"] for entry in checkpoint.read_manifest(folder / trainer.tag)["files"].values()
        ),
    }
    trainer.engine.destroy()
    return held
