"""Reads weights from a checkpoint into a model."""

from pathlib import Path

import torch
from torch import Tensor, nn

from common.errors import UserError
from pipeline.checkpoint.tensors import expert_file, load_tensors, main_file
from pipeline.model.backbone import moe_layers
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


@torch.no_grad()
def read_weights(model: nn.Module, folder: Path) -> set[str]:
    """Copy a tag's weights into the model: what all ranks share, and this rank's experts if the tag has them.

    Returns:
        Names of the model's parameters and persistent buffers that are not in the tag.

    Raises:
        UserError: a file can't be read, or does not fit the model.
    """
    persistent = model.state_dict().keys()
    target: dict[str, Tensor] = {name: tensor for name, tensor in model.named_buffers() if name in persistent}
    target.update(model.named_parameters())
    missing = set(target)

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
    for name, tensor in load_tensors(path)["module"].items():
        copy(name, tensor, path)
    for (layer, number), prefix in local_expert_names(model).items():
        path = folder / expert_file(layer, number)
        if path.is_file():
            for name, tensor in load_tensors(path).items():
                copy(f"{prefix}.{name.rsplit('.', 1)[1]}", tensor, path)
    return missing
