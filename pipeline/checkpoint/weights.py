"""Reads weights from a checkpoint into a model, and writes those of an expert."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from common.errors import UserError
from pipeline.checkpoint.tensors import expert_file, load_tensors, main_file, save_tensors
from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.model.backbone import moe_layers, named_moe_layers
from pipeline.model.expert_plan import ExpertPlan
from pipeline.model.moe.experts import Expert

Reading = Literal["each", "once", "mapped"]  # how ranks read weights, see read_weights
PIECES, SMALLEST_PIECE = 32, 4 << 20  # of a file, and bytes
CLASSIFIER, SELECTION_BIAS = ".gate.classifier.weight", ".gate.selection_bias"


def local_expert_names(model: nn.Module) -> dict[tuple[int, int], str]:
    """For each (MoE layer, file number) on this rank, the prefix of the expert's parameters in the model."""
    return {
        (index, number - 1): expert_prefix(name, slot)
        for index, (name, layer) in enumerate(named_moe_layers(model).items())
        for slot, number in enumerate(layer.local_numbers)
    }


def expert_prefix(layer: str, slot: int) -> str:
    """The prefix of an expert's parameters in a model; in its file, the slot is the expert's number."""
    return f"{layer}.deepspeed_moe.experts.deepspeed_experts.{slot}"


def save_expert(weights: Mapping[str, Tensor], folder: Path, layer: str, moe_layer: int, number: int) -> None:
    """Write the file of one new expert.

    Args:
        weights: under the names of :class:`pipeline.model.moe.experts.Expert`.
        folder: of the tag.
        layer: the MoE layer's name in the model.
        moe_layer: its number among those with a router.
        number: of the expert among the layer's new ones, from 0.
    """
    state = {f"{expert_prefix(layer, number)}.{name}": weight for name, weight in weights.items()}
    save_tensors(state, folder / expert_file(moe_layer, number))


def expert_files(plan: ExpertPlan, dims: ParallelDims, layers: Collection[int] | None = None) -> list[str]:
    """The files of the experts that a rank holds, in all layers or some."""
    return [
        expert_file(moe_layer, number - 1)
        for moe_layer, (layer, placement) in enumerate(plan.placement(dims).items())
        if layers is None or layer in layers
        for number in placement.local
    ]


def files_read_once(plan: ExpertPlan, dims: ParallelDims) -> list[str]:
    """The files that this rank reads where each is read ``once``, if they are there; see :func:`read_weights`."""
    mine = [layer for layer, placement in plan.placement(dims).items() if placement.dims.edp_rank == 0]
    experts = expert_files(plan, dims, mine)
    reads_main = dims.rank == 0 or experts  # see copy_mlps
    return [main_file()] * bool(reads_main) + experts


def _shared_tensors(path: Path, *, by_pieces: bool) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a tag's main file by name, mapped into memory.

    Args:
        path: of the file.
        by_pieces: whether the file is mapped anew after each piece of it, so that no more of it is in this process's
            memory, beside the copies that the caller makes of its tensors; these must not be kept.
    """
    tensors, read = load_tensors(path)["module"], 0
    piece = max(SMALLEST_PIECE, path.stat().st_size // PIECES)
    for name in list(tensors):
        if by_pieces and read > piece:
            tensors, read = load_tensors(path)["module"], 0
        read += tensors[name].nbytes
        yield name, tensors[name]


@torch.no_grad()
def read_weights(model: nn.Module, folder: Path, *, reading: Reading = "each") -> set[str]:
    """Copy a tag's weights into the model: what all ranks share, and this rank's experts if the tag has them.

    Args:
        model: its weights are set in place.
        folder: of the tag.
        reading: ``each`` rank copies all that it holds; or each file is read ``once``, by one rank alone, and an
            engine that is then built gives the others the same weights: DeepSpeed broadcasts them from rank 0, and
            an expert's from the first rank that holds it; or files, ``mapped`` into memory, become the parameters,
            which then take none of their own, and a node's ranks share them.

    Returns:
        Names of the model's parameters and persistent buffers that are not in the tag; of what is not read, none.

    Raises:
        UserError: a file can't be read, or does not fit the model.
    """
    persistent = model.state_dict().keys()
    target: dict[str, Tensor] = {name: tensor for name, tensor in model.named_buffers() if name in persistent}
    buffers = set(target)
    target.update(model.named_parameters())
    experts = local_expert_names(model)
    layers, once, mapped = moe_layers(model), reading == "once", reading == "mapped"
    elsewhere = {prefix for (layer, _), prefix in experts.items() if once and layers[layer].dims.edp_rank > 0}
    reads_shared = not once or layers[0].dims.rank == 0

    def is_read(name: str) -> bool:
        prefix = name.rpartition(".")[0]
        return prefix not in elsewhere if prefix in experts.values() else reads_shared

    missing = {name for name in target if is_read(name)}

    def copy(name: str, tensor: Tensor, path: Path) -> None:
        if name not in target and name.endswith(CLASSIFIER):
            return  # of an earlier expansion: stage 1 trains without classifiers
        if name not in target:
            raise UserError(f"{path}: holds {name}, which this model does not have; name a checkpoint of this model")
        if target[name].shape != tensor.shape:
            raise UserError(
                f"{path}: {name} has shape {list(tensor.shape)}, but the model's has {list(target[name].shape)}; "
                "name a checkpoint of this model and plan"
            )
        if mapped and name not in buffers and tensor.dtype == target[name].dtype:
            target[name].data = tensor
        else:
            target[name].copy_(tensor)
        missing.discard(name)

    path = folder / main_file()
    if not path.is_file():
        raise UserError(f"{path}: does not exist, so the checkpoint is not complete; use another one")
    if reads_shared or buffers:  # DeepSpeed broadcasts parameters alone
        for name, tensor in _shared_tensors(path, by_pieces=not mapped):
            if reads_shared or name in buffers:
                copy(name, tensor, path)
    for (layer, number), prefix in experts.items():
        path = folder / expert_file(layer, number)
        if prefix not in elsewhere and path.is_file():
            for name, tensor in load_tensors(path).items():
                copy(f"{prefix}.{name.rsplit('.', 1)[1]}", tensor, path)
    return missing


@torch.no_grad()
def copy_mlps(model: nn.Module, folder: Path, names: set[str]) -> set[str]:
    """Let new experts begin as copies of their layers' MLPs, from an upcycled tag that has no files of experts.

    Args:
        model: its experts are set in place; whether its MLPs have been read does not matter.
        folder: of the tag.
        names: parameters to set; those that are not an expert's are left alone.

    Returns:
        Which of them were set.
    """
    done: set[str] = set()
    for name, layer in named_moe_layers(model).items():
        prefixes = [expert_prefix(name, slot) for slot in range(len(layer.local_numbers))]
        wanted = [prefix for prefix in prefixes if any(one.startswith(f"{prefix}.") for one in names)]
        if not wanted:
            continue
        mlp = f"{name}.base_mlp."
        stored = load_tensors(folder / main_file())["module"]  # mapped anew, so that one MLP at most is in memory
        weights = {one.removeprefix(mlp): tensor for one, tensor in stored.items() if one.startswith(mlp)}
        for prefix in wanted:
            expert = model.get_submodule(prefix)
            assert isinstance(expert, Expert)
            expert.copy_mlp(weights)
            done |= {f"{prefix}.{parameter}" for parameter, _ in expert.named_parameters()}
    return done
