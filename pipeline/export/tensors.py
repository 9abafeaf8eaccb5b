"""The trained mixture's weights under the names of an exported folder, each made when it is written.

A layer's experts are packed: ``experts.gate_up_proj`` [N, 2F, D] and ``experts.down_proj`` [N, D, F], expert 0 first.
Old and new rows of an embedding or a head are one weight [V, D].
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.errors import UserError
from pipeline.model.backbone import named_moe_layers
from pipeline.model.moe import MoELayer
from pipeline.model.new_rows import Extended, extended_parts

SOURCES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}  # of a packed weight, in an MLP


@dataclass(frozen=True)
class Planned:
    """One tensor of the folder.

    Attributes:
        shape: of it.
        dtype: of it.
        make: gives it, and lets go of the weights that it is made from: it can be called once.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def meta(self) -> Tensor:
        """Without memory."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def planned_tensors(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Planned]:
    """By name, all tensors of the folder; a tied weight is there once.

    Args:
        model: the mixture, whole on one rank.
        dtype: of all but routers, which stay in fp32.

    Raises:
        UserError: its MLPs have biases.
    """
    planned = shared_tensors(model, dtype)
    for name, layer in named_moe_layers(model).items():
        planned.update(_of_layer(name, layer, dtype))
    return planned


def shared_tensors(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Planned]:
    """By name, all tensors that are of no MoE layer; MLPs of dense layers are among them.

    Args:
        model: the mixture, whole on one rank.
        dtype: of the tensors.
    """
    tables = extended_parts(model)
    special: tuple[nn.Module, ...] = (*named_moe_layers(model).values(), *tables.values())
    inside = {id(tensor) for part in special for tensor in (*part.parameters(), *part.buffers())}
    persistent = model.state_dict().keys()
    plain = [*model.named_parameters(), *(pair for pair in model.named_buffers() if pair[0] in persistent)]
    planned = {
        name: Planned(tuple(tensor.shape), dtype, partial(_converted, tensor, dtype))
        for name, tensor in plain
        if id(tensor) not in inside
    }
    for name, table in tables.items():
        planned[f"{name}.weight"] = Planned(
            (table.num_rows, table.weight.shape[1]), dtype, partial(_table, table, dtype)
        )
    return planned


def _table(table: Extended, dtype: torch.dtype) -> Tensor:
    """Old and new rows as one weight, in the order of their ids; then they are gone from the model."""
    whole = torch.cat([part.detach().to(dtype) for part in table.parts()])
    for parameter in (table.weight, table.new_rows):
        parameter.data = parameter.data.new_empty(0)
    return whole


def _of_layer(name: str, layer: MoELayer, dtype: torch.dtype) -> Iterator[tuple[str, Planned]]:
    experts = layer.local_experts.experts
    if experts[0].gate_up_bias is not None or experts[0].down_bias is not None:
        raise UserError(f"export: {name} has biases, for which the exported form has no place")
    for kind in SOURCES:
        shape = (1 + len(experts), *getattr(experts[0], kind).shape)
        yield f"{name}.experts.{kind}", Planned(shape, dtype, partial(_packed, layer, kind, dtype))
    router = layer.router
    yield f"{name}.gate.wg.weight", in_fp32(router.wg.weight)
    if router.classifier is not None:
        yield f"{name}.gate.classifier.weight", in_fp32(router.classifier.weight)
    if router.selection_bias is not None:
        yield f"{name}.gate.selection_bias", in_fp32(router.selection_bias)


def in_fp32(tensor: Tensor) -> Planned:
    """A tensor that stays in fp32, as routers do."""
    return Planned(tuple(tensor.shape), torch.float32, partial(_converted, tensor, torch.float32))


def _converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype).contiguous()


def _packed(layer: MoELayer, kind: str, dtype: torch.dtype) -> Tensor:
    """A layer's weights of one kind; then they are gone from the layer."""
    mlp = layer.base_mlp
    linears: list[nn.Linear] = [getattr(mlp, source) for source in SOURCES[kind]]
    parameters = [getattr(expert, kind) for expert in layer.local_experts.experts]
    weights = [torch.cat([linear.weight for linear in linears]), *parameters]
    packed = torch.stack([weight.detach().to(dtype) for weight in weights])
    for parameter in (*(linear.weight for linear in linears), *parameters):
        parameter.data = parameter.data.new_empty(0)
    return packed
