"""What ranks read, send, hold and compute in a stage: each function runs on every rank of a pool."""

import gc
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.utils import groups

from common.files import sha256_file
from pipeline.checkpoint import verify, weights
from pipeline.checkpoint.store import read_files
from pipeline.checkpoint.tensors import load_tensors
from pipeline.distributed.process_group import Ranks, forget_earlier_stages
from pipeline.model.backbone import moe_layers
from pipeline.records.metrics import StepRow
from pipeline.training import train
from pipeline.training.resume import save
from pipeline.training.state import TrainingState
from pipeline.training.step import train_step
from pipeline.training.train import train_stage
from tests.distributed.stages import canonical, stage_inputs, train_to_the_end

Advance = Callable[[int], object]


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
    path, _ = state.engine.load_checkpoint(str(state.inputs.untrained.folder), load_module_only=True)
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


def kept_from_the_collector(ranks: Ranks, tree: dict[str, Any], folder: Path) -> int:
    """How many objects the garbage collector does not look at while DeepSpeed builds an engine."""
    initialize, counts = deepspeed.initialize, []

    def counting(*arguments: Any, **options: Any) -> Any:
        counts.append(gc.get_freeze_count())
        return initialize(*arguments, **options)

    gc.unfreeze()
    with patch("deepspeed.initialize", counting):
        train_to_the_end(ranks, tree, 1, folder)
    [count] = counts
    return count


def count_experts(ranks: Ranks, tree: dict[str, Any], folder: Path) -> list[int]:
    """Experts on this rank, a layer with a router."""
    state = TrainingState.start(stage_inputs(tree, 1, folder, ranks), ranks)
    counts = [len(layer.local_numbers) for layer in moe_layers(state.engine.module)]
    state.close()
    return counts


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
