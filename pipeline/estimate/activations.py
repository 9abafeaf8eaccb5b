"""What a decoder layer keeps for its backward, measured on three random layers of the model's shape."""

import copy
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.method.stage import Stage
from pipeline.model.backbone import decoder_layers, install_moe_layers
from pipeline.model.expert_plan import ExpertPlan

TOKENS = 256
VOCABULARY = 256
_COUNTS = [3, 1, 3]  # experts per layer; gradients begin at the first layer's router, the other two are measured


@dataclass(frozen=True)
class LayerActivations:
    """Bytes per token that a dense layer and an MoE layer keep for the backward."""

    dense: float
    moe: float


def measure_layers(config: Any, top_k: int, dtype: torch.dtype, stage: Stage) -> LayerActivations:
    """Run three random layers of the config's shape and add up what autograd saves, weights left out.

    Args:
        config: the model's Hugging Face config.
        top_k: experts per token.
        dtype: of the weights.
        stage: what trains.
    """
    small = copy.deepcopy(config)
    small.num_hidden_layers, small.vocab_size = len(_COUNTS), VOCABULARY
    small.pad_token_id = small.bos_token_id = small.eos_token_id = None
    if getattr(small, "layer_types", None):
        small.layer_types = list(small.layer_types)[-len(_COUNTS) :]
    counts = [max(count, top_k + 1) if count > 1 else 1 for count in _COUNTS]
    plan = ExpertPlan.first_expansion(counts, old=["old"], new=["new"], top_k=top_k, classifier_layers=[])
    model = AutoModelForCausalLM.from_config(small, dtype=dtype)
    install_moe_layers(model, plan)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
    stage.train_only(model)
    model.train()
    saved = _saved_by_layer(model)
    return LayerActivations(saved[1] / TOKENS, saved[2] / TOKENS)


def _saved_by_layer(model: Any) -> dict[int, int]:
    """Bytes of new storage that each decoder layer saves in a forward of ``TOKENS`` tokens."""
    seen = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    keep: list[Tensor] = []  # so that no address is reused
    saved: dict[int, int] = defaultdict(int)
    current = [-1]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            keep.append(tensor)
            saved[current[0]] += storage.nbytes()
        return tensor

    def enter(index: int) -> Any:
        def hook(*_: Any) -> None:
            current[0] = index

        return hook

    for index, layer in enumerate(decoder_layers(model)):
        layer.register_forward_pre_hook(enter(index))
    ids = torch.randint(VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(input_ids=ids, use_cache=False).logits
    del output
    return saved
