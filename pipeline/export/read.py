"""Reads an exported folder back into the model in training: the inverse of :mod:`pipeline.export.tensors`."""

from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.errors import UserError, one_line
from common.files import read_json
from pipeline.export.own_code import OwnCode, VllmFused
from pipeline.export.tensors import SOURCES, planned_tensors
from pipeline.model.backbone import empty_model, install_moe_layers, named_moe_layers
from pipeline.model.expert_plan import ExpertPlan
from pipeline.model.moe import MoELayer
from pipeline.model.new_rows import Extended, extended_parts, install_new_rows
from pipeline.records.expansion import EXPANSION_FILE, Expansion


def read_expansion(folder: Path) -> Expansion:
    """What an exported folder says of itself.

    Raises:
        UserError: it is not one, or none that a further expansion can start from.
    """
    path = folder / EXPANSION_FILE
    if not path.is_file():
        raise UserError(
            f"import: {folder} holds no {EXPANSION_FILE}; name a folder that python -m pipeline export wrote of a run "
            "with experts (a dense model needs no import: name it as model.path)"
        )
    expansion = Expansion.load(path)
    if expansion.form not in (OwnCode.name, VllmFused.name):
        raise UserError(
            f"import: {folder} was exported as {expansion.form}, which holds experts in another form; export the run "
            "again without --native"
        )
    if not expansion.holds_all:
        raise UserError(
            f"import: {folder} holds weights in {expansion.written_dtype}, but its run trained in "
            f"{expansion.training_dtype} from weights in {expansion.upcycled.dtype}; export it again with --dtype fp32"
        )
    return expansion


def plan_of(folder: Path, expansion: Expansion) -> ExpertPlan:
    """The expert plan that an exported folder names.

    Raises:
        UserError: it is none.
    """
    try:
        return ExpertPlan.model_validate(expansion.upcycled.plan)
    except (ValidationError, UserError) as error:
        raise UserError(
            f"import: {folder / EXPANSION_FILE}: upcycled.plan is damaged ({one_line(error)}); export the run again"
        ) from error


@torch.no_grad()
def read_exported(folder: Path, hf: Path, expansion: Expansion) -> PreTrainedModel:
    """The model in training, whole on one rank, with the folder's weights in their own dtype.

    Args:
        folder: the exported folder; its files must have been verified.
        hf: a folder with the dense model's config.
        expansion: what the folder says of itself.

    Raises:
        UserError: its tensors are not those of its plan.
    """
    dtype = getattr(torch, expansion.written_dtype)
    model = empty_model(hf, dtype)
    install_moe_layers(
        model,
        plan_of(folder, expansion),
        classifiers=expansion.has_classifiers,
        selection_biases=expansion.selection_biases,
    )
    model.tie_weights()
    install_new_rows(model, expansion.upcycled.new_rows)
    files, planned = _Files(folder), planned_tensors(model, dtype)
    for name, one in planned.items():
        files.check(name, one.shape)
    layers, tables = named_moe_layers(model), extended_parts(model)
    special: tuple[nn.Module, ...] = (*layers.values(), *tables.values())
    inside = {id(parameter) for part in special for parameter in part.parameters()}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in planned and id(tensor) not in inside:
            tensor.copy_(files.tensor(name))
    for name, table in tables.items():
        _read_table(table, files.tensor(f"{name}.weight"))
    for name, layer in layers.items():
        _read_layer(name, layer, files)
    return model


class _Files:
    """The tensors of a folder's files, by name."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file_of = folder, dict[str, str]()
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            self.file_of = read_json(index)["weight_map"]
        else:
            with self._open("model.safetensors") as file:
                self.file_of = dict.fromkeys(file.keys(), "model.safetensors")

    def _open(self, name: str) -> safe_open:
        try:
            return safe_open(self.folder / name, "pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"import: {self.folder / name}: can't be read; export the run again") from error

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Check that there is such a tensor."""
        found: list[int] | None = None
        if name in self.file_of:
            with self._open(self.file_of[name]) as file:
                found = file.get_slice(name).get_shape()
        if found != list(shape):
            raise UserError(
                f"import: {self.folder}: {name} has the shape {found}, but by {EXPANSION_FILE} it has {list(shape)}; "
                "export the run again"
            )

    def tensor(self, name: str) -> Tensor:
        """One tensor."""
        with self._open(self.file_of[name]) as file:
            found: Tensor = file.get_tensor(name)
        return found


def _read_table(table: Extended, whole_VD: Tensor) -> None:
    """Old and new rows; those that the dense model had for the ids of new tokens are not known, nor used, and 0."""
    after = table.first + len(table.new_rows)
    weight, rows = table.weight, len(table.weight)
    weight.zero_()
    weight[: table.first] = whole_VD[: table.first]
    weight[after:] = whole_VD[after : max(rows, after)]
    table.new_rows.copy_(whole_VD[table.first : after])


def _read_layer(name: str, layer: MoELayer, files: _Files) -> None:
    experts = layer.local_experts.experts
    for kind, sources in SOURCES.items():
        packed = files.tensor(f"{name}.experts.{kind}")
        linears: list[nn.Linear] = [getattr(layer.base_mlp, source) for source in sources]
        for linear, part in zip(linears, packed[0].chunk(len(linears)), strict=True):
            linear.weight.copy_(part)
        for expert, weight in zip(experts, packed[1:], strict=True):
            getattr(expert, kind).copy_(weight)
    layer.router.wg.weight.copy_(files.tensor(f"{name}.gate.wg.weight"))
    if layer.router.classifier is not None:
        layer.router.classifier.weight.copy_(files.tensor(f"{name}.gate.classifier.weight"))
    if layer.router.selection_bias is not None:
        layer.router.selection_bias.copy_(files.tensor(f"{name}.gate.selection_bias"))
