"""What a decoder layer keeps for its backward, measured on three random layers of the model's shape."""

import copy
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.config.method import MethodConfig
from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.estimate.imbalance import busiest_rank
from pipeline.method.dense import extend
from pipeline.method.llama_pro import new_blocks
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

    def by_layer(self, plan: ExpertPlan, dims: ParallelDims, *, to_embedding: bool = False) -> list[float]:
        """Of the busiest rank of each layer, if routing is uniform, from the lowest that a gradient gets to.

        It is the first with a router or, ``to_embedding``, where new tokens' rows train, the first of all; those below
        keep nothing. Of an MoE layer the MLPs' part grows with the rows that the rank computes; it is what the layer
        keeps beyond a dense one's, which computes one row per token.
        """
        row = max(0.0, self.moe - self.dense) / max(1, plan.top_k - 1)
        return [
            self.moe + (rows - 1) * plan.top_k * row if count > 1 else self.dense
            for count, rows in zip(plan.counts, busiest_rank(plan, dims), strict=True)
        ][0 if to_embedding else plan.moe_layers[0] :]


@dataclass(frozen=True)
class BaselineActivations:
    """Bytes per token that a layer of a baseline keeps, where it is frozen and where it trains."""

    frozen: float
    trained: float
    method: MethodConfig

    def by_layer(self, plan: ExpertPlan, _dims: ParallelDims, *, to_embedding: bool = False) -> list[float]:
        """Of each layer, from the first that trains on."""
        if self.method.blocks is None:
            return [self.trained] * plan.num_layers
        new = new_blocks(plan.num_layers, self.method.blocks)
        numbers = range(new[0], plan.num_layers + self.method.blocks)
        return [self.trained if number in new else self.frozen for number in numbers]


def measure_layers(config: Any, top_k: int, dtype: torch.dtype, stage: Stage) -> LayerActivations:
    """Run three random layers of the config's shape and add up what autograd saves, weights left out.

    Args:
        config: the model's Hugging Face config.
        top_k: experts per token.
        dtype: of the weights.
        stage: what trains.
    """
    counts = [max(count, top_k + 1) if count > 1 else 1 for count in _COUNTS]
    plan = ExpertPlan.first_expansion(counts, old=["old"], new=["new"], top_k=top_k, classifier_layers=[])
    model = AutoModelForCausalLM.from_config(_small(config), dtype=dtype)
    install_moe_layers(model, plan)
    _fill(model)
    stage.train_only(model)
    model.train()
    saved = _saved_by_layer(model)
    return LayerActivations(saved[1] / TOKENS, saved[2] / TOKENS)


def measure_baseline(config: Any, dtype: torch.dtype, method: MethodConfig) -> BaselineActivations:
    """As :func:`measure_layers`, of a baseline's layers."""
    model = AutoModelForCausalLM.from_config(_small(config), dtype=dtype)
    if method.name == "lora":
        model = extend(model, method, seed=0)
    else:
        model.requires_grad_(False)
        for number in (0, 2):
            decoder_layers(model)[number].requires_grad_(True)
    _fill(model)
    model.train()
    saved = _saved_by_layer(model)
    return BaselineActivations(saved[1] / TOKENS, saved[2] / TOKENS, method)


def _small(config: Any) -> Any:
    """The config of a model of three layers of the same shape."""
    small = copy.deepcopy(config)
    small.num_hidden_layers, small.vocab_size = len(_COUNTS), VOCABULARY
    small.pad_token_id = small.bos_token_id = small.eos_token_id = None
    if getattr(small, "layer_types", None):
        small.layer_types = list(small.layer_types)[-len(_COUNTS) :]
    return small


@torch.no_grad()
def _fill(model: Any) -> None:
    for parameter in model.parameters():
        parameter.normal_(0, 0.02) if parameter.ndim > 1 else parameter.fill_(1.0)


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
