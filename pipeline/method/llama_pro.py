"""LLaMA Pro (arXiv 2401.02415, section 3.2): new blocks between the frozen layers of a dense model."""

import copy
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from common.errors import UserError
from pipeline.config.method import MethodConfig
from pipeline.model.backbone import decoder_layers, find_mlp

_LAYER = re.compile(r"(\.layers\.)(\d+)(\.)")


def sources(num_layers: int, blocks: int) -> list[int]:
    """For each layer of the expanded model, the dense model's layer that it is or was copied from.

    The layers are divided into ``blocks`` groups, as even as possible, and a copy of each group's last layer comes
    after it. So a layer that is named twice is followed by its copy.

    Args:
        num_layers: of the dense model.
        blocks: new blocks.

    Raises:
        UserError: there are more blocks than layers.
    """
    if blocks > num_layers:
        raise UserError(f"method.blocks: {blocks} is more than the model's {num_layers} layers; give at most that")
    last = {(group + 1) * num_layers // blocks - 1 for group in range(blocks)}
    return [layer for number in range(num_layers) for layer in [number] * (1 + (number in last))]


def new_blocks(num_layers: int, blocks: int) -> list[int]:
    """The numbers of the new blocks among the layers of the expanded model; arguments as of :func:`sources`."""
    found = sources(num_layers, blocks)
    return [number for number in range(1, len(found)) if found[number] == found[number - 1]]


@torch.no_grad()
def add_blocks(model: PreTrainedModel, method: MethodConfig, _seed: int) -> PreTrainedModel:
    """Another model with the new blocks; frozen weights are shared with the dense one.

    A new block's maps back into the residual stream, of attention and MLP, are zero: it adds nothing to it at first.

    Args:
        model: the dense model.
        method: how many ``blocks``.

    Raises:
        UserError: there are more blocks than layers, or attention has no ``o_proj``.
    """
    assert method.blocks is not None
    num_layers = len(decoder_layers(model))
    origin = sources(num_layers, method.blocks)
    with no_init_weights():
        expanded = AutoModelForCausalLM.from_config(_config(model.config, origin), dtype=model.dtype)
    state: dict[str, Tensor] = {}
    for number, source in enumerate(origin):
        is_new = number > 0 and origin[number - 1] == source
        state |= {
            _LAYER.sub(rf"\g<1>{number}\g<3>", name, count=1): tensor.clone() if is_new else tensor
            for name, tensor in model.state_dict().items()
            if _layer_of(name) == source
        }
    state |= {name: tensor for name, tensor in model.state_dict().items() if _layer_of(name) is None}
    expanded.load_state_dict(state, assign=True)
    expanded.tie_weights()
    for number in new_blocks(num_layers, method.blocks):
        for part in _back_to_the_stream(decoder_layers(expanded)[number]):
            for parameter in part.parameters():
                parameter.zero_()
    return expanded.eval()


def _layer_of(name: str) -> int | None:
    """The number of the layer that a parameter is of."""
    found = _LAYER.search(name)
    return int(found[2]) if found else None


def _config(dense: Any, origin: list[int]) -> Any:
    """The config of the expanded model; where layers have types, a new block has its source's."""
    config = copy.deepcopy(dense)
    text = config.get_text_config()
    text.num_hidden_layers = len(origin)
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[source] for source in origin]
    return config


def _back_to_the_stream(layer: nn.Module) -> list[nn.Module]:
    """A layer's last maps of attention and MLP."""
    attention = [part for name, part in layer.named_modules() if name.endswith(".o_proj")]
    if len(attention) != 1:
        raise UserError(
            f"method: llama_pro finds no o_proj in {type(layer).__name__}; use Llama, Qwen2, Qwen3, Mistral or Gemma"
        )
    return [attention[0], getattr(layer, find_mlp(layer)).down_proj]


def names_of_new_blocks(model: nn.Module, method: MethodConfig) -> set[str]:
    """The parameters of the new blocks of an expanded model."""
    assert method.blocks is not None
    new = new_blocks(len(decoder_layers(model)) - method.blocks, method.blocks)
    return {name for name, _ in model.named_parameters() if _layer_of(name) in new}
