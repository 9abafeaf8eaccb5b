"""Bytes per rank by kind, bytes per token over the network, bytes of a checkpoint."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.estimate.activations import BaselineActivations, LayerActivations
from pipeline.estimate.zero import FP32, MOMENTS, Gradients, offloaded, zero_gradients
from pipeline.method.stage import Stage
from pipeline.model.backbone import decoder_layers, find_mlp
from pipeline.model.expert_plan import ExpertPlan
from pipeline.model.new_rows import install_new_rows, vocabulary_of
from pipeline.records.checkpoint import NewRows
from pipeline.training.ds_config import offloads

# What is held beyond tensors. On a GPU gaps between blocks and kernels' buffers, a share of all tensors (assumed).
# On a CPU mostly activations that malloc keeps, a share of theirs: measured 23 to 40 % in stage 1 and by baselines, of
# SmolLM2-135M on 2 ranks; estimates are then within 6 %. Weights and moments are mapped into memory one by one.
ALLOCATOR_ON_GPU = 0.08
ALLOCATOR_ON_CPU = 0.3
OFFLOADED = "in host memory"


@dataclass(frozen=True)
class ModelSizes:
    """Parameters of the dense model and its parts.

    Attributes:
        total: of the dense model, with what a baseline adds to it; a tied weight counts once.
        mlp: of one layer's MLP.
        hidden: D.
        vocabulary: V, new tokens included.
        trained: of ``total``, those that train, where a baseline does.
        new_rows: of new tokens' rows, which are not in ``total``.
        rows_train: whether these train in stage 1.
    """

    total: int
    mlp: int
    hidden: int
    vocabulary: int
    trained: int = 0
    new_rows: int = 0
    rows_train: bool = True

    def trained_rows(self, stage: Stage) -> int:
        """Of new tokens' rows, those that train in a stage."""
        return self.new_rows if self.rows_train and stage.trains_experts else 0


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
        routers: of routers and, where the stage has them, classifiers and new tokens' rows; on every rank alike. Of a
            baseline, all.
        experts: of this rank's new experts, by how many ranks hold the same; empty where they are frozen.
    """

    routers: int
    experts: dict[int, int]

    @property
    def total(self) -> int:
        """Both together."""
        return self.routers + sum(self.experts.values())

    def optimized(self, dims: ParallelDims, stage: Stage) -> float:
        """Parameters whose moments, and with ZeRO masters, one rank holds."""
        if not stage.uses_zero:
            return float(self.total)
        parts = [(dims.world_size, self.routers), *self.experts.items()]
        return sum(parameters / replicas for replicas, parameters in parts)

    def reduced(self, dims: ParallelDims) -> float:
        """Parameters that one rank sends when gradients are reduced, in a ring, once around."""
        parts = [(dims.world_size, self.routers), *self.experts.items()]
        return sum(parameters * (ranks - 1) / ranks for ranks, parameters in parts)


def most_experts(plan: ExpertPlan, dims: ParallelDims, *, trained: bool = False) -> dict[int, int]:
    """New experts of the fullest rank, by how many ranks hold the same: all, or those of the last expansion."""
    fullest: Counter[int] = Counter()
    for rank in range(dims.ep_size):
        held: Counter[int] = Counter()
        for number, layer in plan.placement(dims.at_rank(rank)).items():
            frozen = plan.num_frozen(number) if trained else 0
            held[layer.dims.num_replicas] += sum(expert > frozen for expert in layer.local)
        fullest = max(fullest, held, key=lambda counts: counts.total())
    return dict(fullest)


def trained_parameters(sizes: ModelSizes, plan: ExpertPlan, dims: ParallelDims, stage: Stage) -> Trained:
    """What trains on the fullest rank."""
    if not plan.moe_layers:
        return Trained(sizes.trained, {})
    routers = sum(sizes.hidden * plan.counts[layer] for layer in plan.moe_layers)
    if stage.has_classifiers:
        routers += plan.num_groups * sizes.hidden * len(plan.classifier_layers)
    routers += sizes.trained_rows(stage)
    held = most_experts(plan, dims, trained=True) if stage.trains_experts else {}
    return Trained(routers, {replicas: number * sizes.mlp for replicas, number in held.items()})


def memory_by_kind(
    sizes: ModelSizes,
    plan: ExpertPlan,
    dims: ParallelDims,
    batch: Batch,
    layers: LayerActivations | BaselineActivations,
    *,
    dtype: torch.dtype,
    ds_config: dict[str, Any],
    stage: Stage,
    process: int,
    on_gpu: bool = False,
) -> dict[str, float]:
    """Bytes of the fullest rank in training.

    ZeRO-1 as we configure it: gradients are summed in fp32 for all that trains on a rank; masters and moments are
    divided among the ranks that hold the same parameters, with ZeRO-2 the sums of gradients too; see
    :mod:`pipeline.estimate.zero`. Without ZeRO the weights that train are in fp32, need no masters, and each rank
    holds all of their moments.

    Args:
        sizes: of the dense model.
        plan: of the experts.
        dims: how ranks are divided.
        batch: one rank's micro-batch.
        layers: what layers keep for the backward.
        dtype: of the frozen weights.
        ds_config: the run's DeepSpeed config.
        stage: what trains, and how.
        process: bytes of the process before it holds any model.
        on_gpu: whether it has memory of its own, so that what is offloaded does not count.

    Returns:
        Bytes by kind: ``process``, ``weights``, ``gradients``, ``buckets`` (from which gradients are reduced),
        ``master weights``, ``moments``, ``activations`` (with logits), ``allocator``, and the ``peak`` of all
        together; and where a GPU's share is offloaded ``in host memory``, which is not among them.
    """
    width, trained = dtype.itemsize, trained_parameters(sizes, plan, dims, stage)
    held = trained.optimized(dims, stage)
    elsewhere = offloaded(dtype, held) if stage.uses_zero and offloads(ds_config) else {}
    experts = sum(most_experts(plan, dims).values()) * sizes.mlp
    routers = trained.routers if plan.moe_layers else 0  # what a baseline trains is among the total
    frozen_rows = sizes.new_rows - sizes.trained_rows(stage)
    weights = (sizes.total + frozen_rows + experts) * width + routers * (width if stage.uses_zero else FP32)
    gradients = Gradients(float(FP32 * trained.total))
    if stage.uses_zero:
        accumulates = batch.accumulation > 1
        gradients = zero_gradients(ds_config, dtype, trained.total, held, on_gpu=on_gpu, accumulates=accumulates)
    kinds = {
        "process": float(process),
        "weights": float(weights),
        "gradients": gradients.sums,
        "buckets": gradients.buckets,
        "master weights": FP32 * held if stage.uses_zero else 0.0,
        "moments": MOMENTS * held,
    }
    for kind, there in elsewhere.items():
        stays = kinds[kind] if kind == "gradients" else 0.0
        kinds[kind] = stays if on_gpu else stays + there
    logits = batch.tokens * sizes.vocabulary * width  # their gradient takes the same memory
    to_embedding = sizes.trained_rows(stage) > 0
    kept = _activations(plan, dims, batch, layers, sizes.hidden * width, to_embedding=to_embedding)
    kinds["activations"] = kept + logits
    tensors = sum(kinds.values()) - process
    kinds["allocator"] = ALLOCATOR_ON_GPU * tensors if on_gpu else ALLOCATOR_ON_CPU * kinds["activations"]
    kinds["peak"] = sum(kinds.values()) - min(kinds["activations"], gradients.fresh)
    if on_gpu and elsewhere:
        kinds[OFFLOADED] = sum(elsewhere.values())
    return kinds


def _activations(
    plan: ExpertPlan,
    dims: ParallelDims,
    batch: Batch,
    layers: LayerActivations | BaselineActivations,
    hidden_bytes: int,
    *,
    to_embedding: bool,
) -> float:
    """Bytes kept for the backward by the busiest rank of each layer, if routing is uniform."""
    kept = layers.by_layer(plan, dims, to_embedding=to_embedding)
    if batch.checkpoint_activations:  # each layer keeps its input, and one layer at a time is computed again
        # Rows that came from other ranks are kept too, and results that came back, as they are not sent again.
        layers_apart = [num for num in plan.num_new if num and dims.of_layer(num).ep_size > 1]
        exchanged = sum(2 * plan.top_k * num / (num + 1) for num in layers_apart)
        return batch.tokens * (hidden_bytes * (len(kept) + exchanged) + max(kept))
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
    trips = 4
    layers = [(num, dims.of_layer(num).ep_size) for num in plan.num_new if num]
    away = sum(plan.top_k * num / (num + 1) * (ranks - 1) / ranks for num, ranks in layers)
    reduced = trained.reduced(dims) / (batch.tokens * batch.accumulation)
    return {
        "tokens": away * trips * sizes.hidden * dtype.itemsize,
        "gradients": FP32 * 2 * reduced,
        "weights": dtype.itemsize * reduced if stage.uses_zero else 0.0,
    }


def checkpoint_bytes(sizes: ModelSizes, plan: ExpertPlan, dims: ParallelDims, dtype: torch.dtype, stage: Stage) -> int:
    """Bytes of a checkpoint: the weights that train, and masters and moments in fp32."""
    trained = trained_parameters(sizes, plan, dims, stage)
    if not stage.uses_zero:
        return trained.routers * (FP32 + MOMENTS)
    experts = sum(plan.rounds[-1].num_new) * sizes.mlp if stage.trains_experts else 0
    return (experts + trained.routers) * (dtype.itemsize + FP32 + MOMENTS)


def model_sizes(config: Any, rows: NewRows | None = None) -> ModelSizes:
    """Count the parameters of a config, and of rows for new tokens, without allocating them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    layer = decoder_layers(model)[0]
    mlp = getattr(layer, find_mlp(layer))
    total = sum(parameter.numel() for parameter in model.parameters())
    added = install_new_rows(model, rows)
    return ModelSizes(
        total=total,
        mlp=sum(parameter.numel() for parameter in mlp.parameters()),
        hidden=mlp.gate_proj.in_features,
        vocabulary=vocabulary_of(model),
        new_rows=sum(parameter.numel() for parameter in added),
        rows_train=rows is None or rows.train,
    )
