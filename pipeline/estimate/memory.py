"""Bytes a rank by kind, bytes a token over the network, bytes of a checkpoint."""

from dataclasses import dataclass
from typing import Any

import torch

from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.estimate.activations import LayerActivations
from pipeline.model.backbone import Stage
from pipeline.model.expert_plan import ExpertPlan

# Of all tensors: what lies between blocks, and kernels' own. Measured: 7 to 10 % on a CPU, at 1 and 2 ranks.
ALLOCATOR = 0.08


@dataclass(frozen=True)
class ModelSizes:
    """Parameters of the dense model and its parts.

    Attributes:
        total: of the dense model, shared ones once.
        mlp: of one layer's MLP.
        hidden: D. vocabulary: V.
    """

    total: int
    mlp: int
    hidden: int
    vocabulary: int


@dataclass(frozen=True)
class Batch:
    """One rank's micro-batch. ``accumulation`` micro-steps make a step."""

    sequences: int
    sequence_length: int
    accumulation: int
    checkpoint_activations: bool

    @property
    def tokens(self) -> int:
        """Tokens that a rank computes at once."""
        return self.sequences * self.sequence_length


def experts_by_rank(plan: ExpertPlan, ep_size: int) -> list[int]:
    """New experts on each rank of an expert-parallel group."""
    placement = plan.placement(ep_size).values()
    return [sum(len(layer[rank]) for layer in placement) for rank in range(ep_size)]


def router_parameters(sizes: ModelSizes, plan: ExpertPlan, stage: Stage) -> int:
    """Parameters of routers, and in stage 2 of classifiers."""
    routers = sum(sizes.hidden * plan.counts[layer] for layer in plan.moe_layers)
    return routers + (2 * sizes.hidden * len(plan.classifier_layers) if stage == 2 else 0)


def memory_by_kind(
    sizes: ModelSizes,
    plan: ExpertPlan,
    dims: ParallelDims,
    batch: Batch,
    layers: LayerActivations,
    *,
    dtype: torch.dtype,
    stage: Stage,
    process: int,
) -> dict[str, float]:
    """Bytes of the fullest rank in training, by kind, and their peak.

    ZeRO-1 as this product runs it: gradients are accumulated in fp32 for all that a rank holds, masters and
    moments are divided among the ranks that hold the same parameters. Stage 2 trains routers alone, in fp32.

    Args:
        process: bytes of the process before it holds any model.
    """
    width = dtype.itemsize
    experts = max(experts_by_rank(plan, dims.ep_size)) * sizes.mlp
    routers = router_parameters(sizes, plan, stage)
    trained = routers + (experts if stage == 1 else 0)
    divided = routers / dims.world_size + (experts * dims.ep_size / dims.world_size if stage == 1 else 0)
    weights = (sizes.total + experts) * width + routers * (width if stage == 1 else 4)
    kinds = {
        "process": float(process),
        "weights": float(weights),
        # fp32 sums, and beside them what the backward of one micro-batch leaves, in the weights' own type.
        "gradients": float(trained * (4 + width if stage == 1 else 4)),
        "master weights": 4 * divided if stage == 1 else 0.0,
        "moments": 8 * divided if stage == 1 else 8.0 * routers,
    }
    activations = _activations(plan, batch, layers, sizes.hidden * width)
    logits = 2 * batch.tokens * sizes.vocabulary * width  # and their gradient
    kinds["activations"] = activations + logits
    fresh = 0.0 if batch.accumulation > 1 else min(kinds["activations"], trained * width if stage == 1 else 0.0)
    kinds["allocator"] = ALLOCATOR * (sum(kinds.values()) - process)
    # With one micro-batch a step, its gradients come as its activations go.
    kinds["peak"] = sum(kinds.values()) - fresh
    return kinds


def _activations(plan: ExpertPlan, batch: Batch, layers: LayerActivations, hidden_bytes: int) -> float:
    """Layers below the first router keep nothing: no gradient gets there."""
    kept = [layers.moe if count > 1 else layers.dense for count in plan.counts[plan.moe_layers[0] :]]
    if batch.checkpoint_activations:  # every layer keeps its input, and one at a time is computed again
        return batch.tokens * (hidden_bytes * len(kept) + max(kept))
    return batch.tokens * sum(kept)


def network_per_token(
    sizes: ModelSizes, plan: ExpertPlan, dims: ParallelDims, batch: Batch, *, dtype: torch.dtype, stage: Stage
) -> dict[str, float]:
    """Bytes that leave a rank for each token it computes, if routers choose all experts alike.

    ``tokens`` there and back, forward and backward; ``gradients`` and ``weights`` once a step, in a ring.
    """
    away = (dims.ep_size - 1) / dims.ep_size
    trips = 4 + (2 if batch.checkpoint_activations else 0)
    rows = sum(plan.top_k * (count - 1) / count for count in plan.counts if count > 1)
    experts = max(experts_by_rank(plan, dims.ep_size)) * sizes.mlp if stage == 1 else 0
    routers, replicas = router_parameters(sizes, plan, stage), dims.num_replicas
    in_a_step = batch.tokens * batch.accumulation

    def ring(parameters: float, ranks: int) -> float:
        return parameters * (ranks - 1) / ranks / in_a_step

    return {
        "tokens": rows * away * trips * sizes.hidden * dtype.itemsize,
        "gradients": 4 * 2 * (ring(experts, replicas) + ring(routers, dims.world_size)),
        "weights": dtype.itemsize * (ring(experts, replicas) + ring(routers, dims.world_size)) if stage == 1 else 0.0,
    }


def checkpoint_bytes(sizes: ModelSizes, plan: ExpertPlan, dims: ParallelDims, dtype: torch.dtype, stage: Stage) -> int:
    """What trained: weights, and masters and moments in fp32."""
    routers = router_parameters(sizes, plan, stage)
    if stage == 2:
        return routers * (4 + 8 * dims.ep_size)  # every expert-parallel rank writes the routers' optimizer
    return (sum(plan.num_new) * sizes.mlp + routers) * (dtype.itemsize + 4 + 8)


def model_sizes(config: Any) -> ModelSizes:
    """Count a config's parameters without making them."""
    from transformers import AutoModelForCausalLM

    from pipeline.model.backbone import decoder_layers, find_mlp

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    layer = decoder_layers(model)[0]
    mlp = getattr(layer, find_mlp(layer))
    return ModelSizes(
        total=sum(parameter.numel() for parameter in model.parameters()),
        mlp=sum(parameter.numel() for parameter in mlp.parameters()),
        hidden=mlp.gate_proj.in_features,
        vocabulary=config.get_text_config().vocab_size,
    )
