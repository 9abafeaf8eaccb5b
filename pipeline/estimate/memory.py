"""Bytes per rank by kind, bytes per token over the network, bytes of a checkpoint."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.estimate.activations import LayerActivations
from pipeline.estimate.imbalance import busiest_rank
from pipeline.method.stage import Stage
from pipeline.model.backbone import decoder_layers, find_mlp
from pipeline.model.expert_plan import ExpertPlan

# A share of all tensors: gaps between blocks, and buffers of the kernels. Measured: 7 to 10 % on a CPU, 1 and 2 ranks.
ALLOCATOR = 0.08
FP32 = 4  # bytes
MOMENTS = 2 * FP32  # Adam's, per parameter


@dataclass(frozen=True)
class ModelSizes:
    """Parameters of the dense model and its parts.

    Attributes:
        total: of the dense model; a tied weight counts once.
        mlp: of one layer's MLP.
        hidden: D.
        vocabulary: V.
    """

    total: int
    mlp: int
    hidden: int
    vocabulary: int


@dataclass(frozen=True)
class Batch:
    """One rank's micro-batch.

    Attributes:
        sequences: B.
        sequence_length: L.
        accumulation: micro-steps per optimizer step.
        checkpoint_activations: whether activations are computed again in the backward.
    """

    sequences: int
    sequence_length: int
    accumulation: int
    checkpoint_activations: bool

    @property
    def tokens(self) -> int:
        """Tokens that a rank computes at once."""
        return self.sequences * self.sequence_length


@dataclass(frozen=True)
class Trained:
    """Parameters of the fullest rank that train in a stage.

    Attributes:
        routers: of routers and, where the stage has them, classifiers; on every rank alike.
        experts: of this rank's new experts, 0 where they are frozen.
    """

    routers: int
    experts: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.routers + self.experts

    def optimized(self, dims: ParallelDims, stage: Stage) -> float:
        """Parameters whose moments, and with ZeRO masters, one rank holds."""
        if not stage.uses_zero:
            return float(self.total)
        return self.routers / dims.world_size + self.experts / dims.num_replicas


def experts_by_rank(plan: ExpertPlan, ep_size: int) -> list[int]:
    """New experts on each rank of an expert-parallel group."""
    placement = plan.placement(ep_size).values()
    return [sum(len(layer[rank]) for layer in placement) for rank in range(ep_size)]


def trained_parameters(sizes: ModelSizes, plan: ExpertPlan, dims: ParallelDims, stage: Stage) -> Trained:
    """What trains on the fullest rank."""
    routers = sum(sizes.hidden * plan.counts[layer] for layer in plan.moe_layers)
    if stage.has_classifiers:
        routers += 2 * sizes.hidden * len(plan.classifier_layers)
    experts = max(experts_by_rank(plan, dims.ep_size)) * sizes.mlp if stage.trains_experts else 0
    return Trained(routers, experts)


def memory_by_kind(
    sizes: ModelSizes,
    plan: ExpertPlan,
    dims: ParallelDims,
    batch: Batch,
    layers: LayerActivations,
    *,
    dtype: torch.dtype,
    gradient_bytes: int,
    stage: Stage,
    process: int,
) -> dict[str, float]:
    """Bytes of the fullest rank in training.

    ZeRO-1 as we configure it: gradients are summed in fp32 for all that trains on a rank; masters and moments are
    divided among the ranks that hold the same parameters. Without ZeRO the weights that train are in fp32, need no
    masters, and each rank holds all of their moments.

    Args:
        sizes: of the dense model.
        plan: of the experts.
        dims: how ranks are divided.
        batch: one rank's micro-batch.
        layers: what layers keep for the backward.
        dtype: of the frozen weights.
        gradient_bytes: per weight that trains under ZeRO; see :func:`pipeline.training.ds_config.gradient_bytes`.
        stage: what trains, and how.
        process: bytes of the process before it holds any model.

    Returns:
        Bytes by kind: ``process``, ``weights``, ``gradients``, ``master weights``, ``moments``, ``activations`` (with
        logits), ``allocator``, and the ``peak`` of all together.
    """
    width, trained = dtype.itemsize, trained_parameters(sizes, plan, dims, stage)
    experts = max(experts_by_rank(plan, dims.ep_size)) * sizes.mlp
    held = trained.optimized(dims, stage)
    weights = (sizes.total + experts) * width + trained.routers * (width if stage.uses_zero else FP32)
    kinds = {
        "process": float(process),
        "weights": float(weights),
        "gradients": float(trained.total * (gradient_bytes if stage.uses_zero else FP32)),
        "master weights": FP32 * held if stage.uses_zero else 0.0,
        "moments": MOMENTS * held,
    }
    logits = 2 * batch.tokens * sizes.vocabulary * width  # and their gradient
    kinds["activations"] = _activations(plan, dims, batch, layers, sizes.hidden * width) + logits
    fresh = trained.total * (gradient_bytes - FP32) if stage.uses_zero and batch.accumulation == 1 else 0.0
    kinds["allocator"] = ALLOCATOR * (sum(kinds.values()) - process)
    # With one micro-batch per step, its gradients come as its activations go.
    kinds["peak"] = sum(kinds.values()) - min(kinds["activations"], fresh)
    return kinds


def _activations(
    plan: ExpertPlan, dims: ParallelDims, batch: Batch, layers: LayerActivations, hidden_bytes: int
) -> float:
    """Bytes kept for the backward by the busiest rank of each layer, if routing is uniform.

    Layers below the first router keep nothing: no gradient gets there. Of an MoE layer the MLPs' part grows with the
    rows that the rank computes; it is what the layer keeps beyond a dense one's, which computes one row per token.
    """
    row = max(0.0, layers.moe - layers.dense) / max(1, plan.top_k - 1)
    kept = [
        layers.moe + (rows - 1) * plan.top_k * row if count > 1 else layers.dense
        for count, rows in zip(plan.counts, busiest_rank(plan, dims.ep_size), strict=True)
    ][plan.moe_layers[0] :]
    if batch.checkpoint_activations:  # each layer keeps its input, and one layer at a time is computed again
        return batch.tokens * (hidden_bytes * len(kept) + max(kept))
    return batch.tokens * sum(kept)


def network_per_token(
    sizes: ModelSizes, plan: ExpertPlan, dims: ParallelDims, batch: Batch, *, dtype: torch.dtype, stage: Stage
) -> dict[str, float]:
    """Bytes that a rank sends per token that it computes, if routers choose all experts equally often.

    Returns:
        By kind: ``tokens`` to experts and back, forward and backward; ``gradients`` and, with ZeRO, ``weights``, once
        per step in a ring.
    """
    trained = trained_parameters(sizes, plan, dims, stage)
    away = (dims.ep_size - 1) / dims.ep_size
    trips = 4 + (2 if batch.checkpoint_activations else 0)
    rows = sum(plan.top_k * (count - 1) / count for count in plan.counts if count > 1)
    tokens_per_step = batch.tokens * batch.accumulation

    def ring(parameters: float, ranks: int) -> float:
        return parameters * (ranks - 1) / ranks / tokens_per_step

    reduced = ring(trained.experts, dims.num_replicas) + ring(trained.routers, dims.world_size)
    return {
        "tokens": rows * away * trips * sizes.hidden * dtype.itemsize,
        "gradients": FP32 * 2 * reduced,
        "weights": dtype.itemsize * reduced if stage.uses_zero else 0.0,
    }


def checkpoint_bytes(sizes: ModelSizes, plan: ExpertPlan, dims: ParallelDims, dtype: torch.dtype, stage: Stage) -> int:
    """Bytes of a checkpoint: the weights that train, and masters and moments in fp32."""
    trained = trained_parameters(sizes, plan, dims, stage)
    if not stage.uses_zero:  # each rank of one expert-parallel group writes all of the moments
        return trained.routers * (FP32 + MOMENTS * dims.ep_size)
    experts = sum(plan.num_new) * sizes.mlp if stage.trains_experts else 0
    return (experts + trained.routers) * (dtype.itemsize + FP32 + MOMENTS)


def model_sizes(config: Any) -> ModelSizes:
    """Count a config's parameters without allocating them."""
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
