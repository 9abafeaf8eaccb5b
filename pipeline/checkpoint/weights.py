"""Reads weights from a checkpoint into a model."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from common.errors import UserError
from pipeline.checkpoint.tensors import expert_file, load_tensors, main_file
from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.model.backbone import moe_layers
from pipeline.model.expert_plan import ExpertPlan
from pipeline.model.moe import MoELayer


def local_expert_names(model: nn.Module) -> dict[tuple[int, int], str]:
    """For each (MoE layer, file number) on this rank, the prefix of the expert's parameters in the model."""
    prefixes = {layer: name for name, layer in model.named_modules() if isinstance(layer, MoELayer)}
    result = {}
    for index, layer in enumerate(moe_layers(model)):
        numbers = layer.local_numbers
        for slot, number in enumerate(numbers):
            result[index, number - 1] = f"{prefixes[layer]}.deepspeed_moe.experts.deepspeed_experts.{slot}"
    return result


def expert_files(plan: ExpertPlan, dims: ParallelDims) -> list[str]:
    """The files of the experts that a rank holds."""
    placement = plan.placement(dims.ep_size)
    return [
        expert_file(moe_layer, number - 1)
        for moe_layer, layer in enumerate(plan.moe_layers)
        for number in placement[layer][dims.ep_rank]
    ]


@dataclass(frozen=True)
class Readers:
    """Which weights a rank reads; the engine that is built next broadcasts them to the others.

    Attributes:
        shared: those that all ranks hold.
        experts: those of this rank's experts.
    """

    shared: bool = True
    experts: bool = True

    @classmethod
    def of(cls, dims: ParallelDims) -> "Readers":
        """So that every file is read by one rank: DeepSpeed broadcasts from rank 0, and from the first group."""
        return cls(shared=dims.rank == 0, experts=dims.edp_rank == 0)

    def files(self, plan: ExpertPlan, dims: ParallelDims) -> list[str]:
        """The names of the files that it reads."""
        return [main_file()] * self.shared + expert_files(plan, dims) * self.experts


EVERYTHING = Readers()


@torch.no_grad()
def read_weights(model: nn.Module, folder: Path, readers: Readers = EVERYTHING) -> set[str]:
    """Copy a tag's weights into the model: what all ranks share, and this rank's experts if the tag has them.

    Args:
        model: its weights are set in place.
        folder: of the tag.
        readers: what this rank reads of them.

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
    of_experts = {name for name in target if name.rpartition(".")[0] in experts.values()}
    missing = {name for name in target if (readers.experts if name in of_experts else readers.shared)}

    def copy(name: str, tensor: Tensor, path: Path) -> None:
        if name not in target:
            raise UserError(f"{path}: holds {name}, which this model does not have; name a checkpoint of this model")
        if target[name].shape != tensor.shape:
            raise UserError(
                f"{path}: {name} has shape {list(tensor.shape)}, but the model's has {list(target[name].shape)}; "
                "name a checkpoint of this model and plan"
            )
        target[name].copy_(tensor)
        missing.discard(name)

    path = folder / main_file()
    if not path.is_file():
        raise UserError(f"{path}: does not exist, so the checkpoint is not complete; use another one")
    if readers.shared or buffers:  # DeepSpeed broadcasts parameters alone
        for name, tensor in load_tensors(path)["module"].items():
            if readers.shared or name in buffers:
                copy(name, tensor, path)
    for (layer, number), prefix in experts.items():
        path = folder / expert_file(layer, number)
        if readers.experts and path.is_file():
            for name, tensor in load_tensors(path).items():
                copy(f"{prefix}.{name.rsplit('.', 1)[1]}", tensor, path)
    return missing
