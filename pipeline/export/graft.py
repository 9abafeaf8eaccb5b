"""Adds to a trained model what instruction tuning added to its dense model (DeltaMoE, arXiv 2605.18083).

To each weight that the dense model has, the instruct model's minus the dense model's is added; new experts, which
began as copies of their layer's MLP, get the MLP's difference. Routers, classifiers and rows of new tokens have no
counterpart and stay. What it is worth depends on how far training has moved the experts: experimental.
"""

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from common.errors import UserError
from pipeline.model.backbone import decoder_layers, load_dense, named_moe_layers
from pipeline.model.model_folder import model_config
from pipeline.model.moe.experts import fused_weights

BASE_MLP = ".base_mlp."  # what an MLP's weights are called by in a mixture, beside their dense names


@torch.no_grad()
def graft(model: PreTrainedModel, base: Path, instruct: Path) -> int:
    """Add the difference, weight by weight, computed in fp32 and kept in the weight's own dtype.

    Both dense models are read into memory.

    Args:
        model: whole on one rank, on the CPU, without adapters; changed in place.
        base: folder of the dense model that it was made from.
        instruct: folder of the same model after instruction tuning.

    Returns:
        How many weights there were to change, each expert's counted.

    Raises:
        UserError: the two dense models differ in shapes or tokenizers, or do not differ at all, or the trained model
            has other layers than they.
    """
    _check_tokenizers(base, instruct)
    before, after = _weights(base), _weights(instruct)
    _check_shapes({name: weight.shape for name, weight in before.items()}, after, base, instruct)
    if all(torch.equal(weight, after[name]) for name, weight in before.items()):
        raise UserError(f"--graft: {instruct} has the weights of {base}: there is nothing to add; name another model")
    if len(decoder_layers(model)) != model_config(base).get_text_config().num_hidden_layers:
        raise UserError("--graft: the trained model has other layers than the dense one; graft onto another method's")
    changed = 0
    for name, parameter in model.named_parameters():
        dense = name.replace(BASE_MLP, ".")
        if dense in before:
            _add(parameter, after[dense], before[dense])
            changed += 1
    for name, layer in named_moe_layers(model).items():
        mlp_before, mlp_after = (fused_weights(_part(weights, f"{name}.")) for weights in (before, after))
        for expert in layer.local_experts.experts:
            for kind, parameter in expert.named_parameters():
                _add(parameter, mlp_after[kind], mlp_before[kind])
                changed += 1
    return changed


def chat_template(instruct: Path) -> str | None:
    """The instruct model's chat template, if it has one."""
    template: str | None = AutoTokenizer.from_pretrained(instruct).chat_template
    return template


def _add(parameter: Tensor, after: Tensor, before: Tensor) -> None:
    parameter.copy_(parameter.float() + (after.float() - before.float()))


def _part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def _weights(folder: Path) -> dict[str, Tensor]:
    dtype = getattr(torch, str(model_config(folder).dtype or torch.float32).removeprefix("torch."))
    return dict(load_dense(folder, dtype).named_parameters())


def _check_shapes(shapes: dict[str, torch.Size], after: dict[str, Tensor], base: Path, instruct: Path) -> None:
    for name in sorted({*shapes, *after}):
        ours, theirs = (
            tuple(one) if one is not None else "nothing" for one in (shapes.get(name), _shape(after, name))
        )
        if ours != theirs:
            raise UserError(
                f"--graft: {instruct}: {name} is {theirs}, but {ours} in {base}; name an instruct model that was "
                "tuned from this very model"
            )


def _shape(weights: dict[str, Tensor], name: str) -> torch.Size | None:
    return weights[name].shape if name in weights else None


def _check_tokenizers(base: Path, instruct: Path) -> None:
    ours, theirs = (AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (base, instruct))
    different = sorted({*ours.items()} ^ {*theirs.items()}, key=lambda entry: entry[1])
    if different:
        token, number = different[0]
        raise UserError(
            f"--graft: {instruct}: its tokenizer differs from that of {base} in {len(different)} tokens, such as "
            f"{token!r} ({number}); name an instruct model with the same tokenizer"
        )
