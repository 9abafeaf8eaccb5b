"""Model FLOPs utilization: the operations that the method needs, over those that the devices could do meanwhile."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from pipeline.config.run import LogConfig
from pipeline.distributed.device import device_name
from pipeline.method.stage import Stage
from pipeline.model.backbone import decoder_layers
from pipeline.model.expert_plan import ExpertPlan
from pipeline.model.moe import MoELayer
from pipeline.model.new_rows import install_new_rows, new_rows, vocabulary_of
from pipeline.records.checkpoint import NewRows

# 10^12 dense bf16 operations per second, by what a device's name contains: makers' data sheets, without sparsity.
PEAK_TFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0, "B200": 2250.0, "L40S": 362.0, "MI300X": 1307.0,
               "RTX 4090": 165.0}  # fmt: skip


def flops_per_token(model: nn.Module, sequence_length: int) -> float:
    """Floating-point operations of a training step per token: forward and backward, recomputation left out.

    A multiplication and its addition are two. Forward: two per weight of each linear map that the token meets, K of
    the MLPs in a layer with a router, and 2 L H for attention's two products in each layer, where L is the sequence
    length, half of which a token sees on average, and H is all heads' width. Backward, in layers above the first
    one with a weight that trains: as many again for the gradient of the inputs, and twice as many for attention's. And
    two per weight that trains: in stage 1 of the new experts, to which uniform routing sends a token K (N - 1) / N
    times, and of the head's rows of new tokens.

    Args:
        model: as a stage trains it.
        sequence_length: L.
    """
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    heads = config.num_attention_heads
    attention = 2.0 * sequence_length * heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    forward = backward = 0.0
    is_above = any(p.requires_grad for p in model.get_input_embeddings().parameters())  # type: ignore[operator]
    for layer in decoder_layers(model):
        moe = next((module for module in layer.modules() if isinstance(module, MoELayer)), None)
        weights, trained = float(_linear(layer)), float(_linear(layer, trains=True))
        if moe is not None:
            mlp, top_k = _linear(moe.base_mlp), moe.router.top_k
            weights += (top_k - 1) * mlp
            trained += mlp * top_k * (moe.num_experts - 1) / moe.num_experts * moe.experts_train
        forward += 2 * weights + attention
        backward += 2 * trained + (2 * weights + 2 * attention if is_above else 0.0)
        is_above = is_above or any(parameter.requires_grad for parameter in layer.parameters())
    head, head_trains = 2.0 * vocabulary_of(model) * config.hidden_size, _linear(_head(model), trains=True) > 0
    of_new_rows = 2.0 * sum(len(rows) * rows.requires_grad for rows in new_rows(model)[-1:]) * config.hidden_size
    return forward + backward + (3 if head_trains else 2) * head + of_new_rows


def flops_of_stage(config: Any, plan: ExpertPlan, stage: Stage, rows: NewRows | None = None) -> float:
    """Operations of a stage per token, see :func:`flops_per_token`, counted on a model without memory.

    Args:
        config: the dense model's Hugging Face config.
        plan: of its experts.
        stage: what trains, at which sequence length.
        rows: for new tokens; None where there are none.

    Raises:
        UserError: the plan is for another number of layers.
    """
    with torch.device("meta"):
        model = stage.install(AutoModelForCausalLM.from_config(config), plan)
        install_new_rows(model, rows)
    stage.train_only(model)
    return flops_per_token(model, stage.settings.sequence_length)


def _head(model: nn.Module) -> nn.Module:
    head = model.get_output_embeddings()  # type: ignore[operator]
    assert isinstance(head, nn.Module)
    return head


def _linear(module: nn.Module, *, trains: bool = False) -> int:
    """Weights of a module's linear maps, all or those that train; experts' own are not among them."""
    weights = [part.weight for part in module.modules() if isinstance(part, nn.Linear)]
    return sum(weight.numel() for weight in weights if weight.requires_grad or not trains)


def peak_flops(log: LogConfig, device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations per second of one device: the run's ``log.peak_tflops``, or what its maker says; None if unknown."""
    if log.peak_tflops is not None:
        return log.peak_tflops * 1e12
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = device_name(device).upper()
    return next((tflops * 1e12 for key, tflops in PEAK_TFLOPS.items() if key in name), None)
