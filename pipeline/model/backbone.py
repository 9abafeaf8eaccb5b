"""The Hugging Face model: loading it, putting MoE layers into it, freezing all that does not train."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from common.errors import UserError
from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.model.expert_plan import ExpertPlan
from pipeline.model.model_folder import incomplete_model, model_config
from pipeline.model.moe import MoELayer
from pipeline.model.new_rows import new_rows

transformers_logging.disable_progress_bar()  # we show our own
ONE_RANK = ParallelDims(world_size=1, ep_size=1)
_GATED = ("gate_proj", "up_proj", "down_proj")


def load_dense(folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Load a dense causal language model, without dropout, and check that its MLPs can become experts.

    Raises:
        UserError: it can't be loaded, or has no gated MLPs.
    """
    config = _without_dropout(model_config(folder))
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype)
    except (OSError, ValueError) as error:
        raise incomplete_model(f"model.path: {folder}: can't be loaded", error) from error
    for layer in decoder_layers(model):
        find_mlp(layer)
    return move(model, device).eval()


def move(model: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
    """``model.to(device)``, which transformers declares in a way that type checkers reject."""
    nn.Module.to(model, device)
    return model


def empty_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The architecture that a folder's config describes, without dropout; its weights are not set."""
    config = _without_dropout(model_config(folder))
    with no_init_weights():
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def _without_dropout(config: Any) -> Any:
    """A config under which training is not random, so that a resumed run is the same run."""
    if getattr(config, "attention_dropout", 0.0):
        config.attention_dropout = 0.0
    return config


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The model's list of decoder layers.

    Raises:
        UserError: it has none.
    """
    layers = getattr(getattr(model, "base_model", model), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UserError(
            f"model.path: {type(model).__name__} has no list of decoder layers with gate_proj/up_proj/down_proj MLPs; "
            "use Llama, Qwen2, Qwen3, Mistral, Gemma or one built like them"
        )
    return layers


def find_mlp(layer: nn.Module) -> str:
    """The name of a decoder layer's gated MLP, or of the MoE layer in its place.

    Raises:
        UserError: the layer has none whose three projections are plain linear maps.
    """
    for name, child in layer.named_children():
        if isinstance(child, MoELayer):
            return name
        if all(isinstance(getattr(child, part, None), nn.Linear) for part in _GATED) and hasattr(child, "act_fn"):
            return name
    names = ", ".join(f"{name}: {type(child).__name__}" for name, child in layer.named_children())
    raise UserError(
        f"model.path: {type(layer).__name__} has no MLP with gate_proj, up_proj and down_proj ({names}); "
        "such a model can't be upcycled: use Llama, Qwen2, Qwen3, Mistral, Gemma or one built like them"
    )


def install_moe_layers(
    model: PreTrainedModel,
    plan: ExpertPlan,
    dims: ParallelDims = ONE_RANK,
    *,
    classifiers: bool = False,
    selection_biases: bool = False,
) -> dict[int, MoELayer]:
    """Replace MLPs by MoE layers where the plan has new experts; a layer of one expert stays dense.

    The new experts' weights are not set.

    Args:
        model: the dense model; changed in place.
        plan: of its experts.
        dims: how experts are spread over ranks; all on one rank unless given.
        classifiers: whether the plan's classifier layers get their classifier.
        selection_biases: whether routers get a selection bias, of zeros.

    Returns:
        The MoE layers, by the number of their decoder layer.

    Raises:
        UserError: the plan is for another number of layers.
    """
    layers = decoder_layers(model)
    if len(layers) != plan.num_layers:
        raise UserError(
            f"expert plan: made for {plan.num_layers} layers, but the model has {len(layers)}; allocate again"
        )
    installed: dict[int, MoELayer] = {}
    for index, placement in plan.placement(dims).items():
        name = find_mlp(layers[index])
        installed[index] = MoELayer(
            getattr(layers[index], name),
            num_experts=plan.counts[index],
            top_k=plan.top_k,
            placement=placement,
            has_classifier=classifiers and index in plan.classifier_layers,
            old_experts=plan.old_experts(index),
            has_selection_bias=selection_biases,
            classifies_sequences=plan.classifier == "sequence",
        )
        setattr(layers[index], name, installed[index])
    return installed


def named_moe_layers(model: nn.Module) -> dict[str, MoELayer]:
    """The model's MoE layers by name, in order; without its dense layers."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """The model's MoE layers, in order; without its dense layers."""
    return list(named_moe_layers(model).values())


def padding_matters(model: nn.Module) -> bool:
    """Whether padding changes what other tokens of its sequence get: where routers classify whole sequences."""
    return any(layer.router.classifies_sequences for layer in moe_layers(model))


def train_only(model: nn.Module, *, experts: bool, classifiers: bool) -> None:
    """Freeze all of the model except its routers.

    Args:
        model: with its MoE layers.
        experts: whether the new experts train too, with rows of new tokens; expert 0 and all that is of earlier
            expansions never does.
        classifiers: whether the routing classifiers train too.
    """
    model.requires_grad_(False)
    for rows in new_rows(model, that_train=True):
        rows.requires_grad_(experts)
    for layer in moe_layers(model):
        layer.router.wg.requires_grad_(True)
        layer.experts_train = experts and layer.num_experts > layer.router.old_experts[-1]
        for number, expert in zip(layer.local_numbers, layer.local_experts.experts, strict=True):
            expert.requires_grad_(layer.trains(number))
        if layer.router.classifier is not None:
            layer.router.classifier.requires_grad_(classifiers)


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The optimizer's parameter groups: what all ranks hold alike, that is routers, classifiers and rows of new
    tokens, then, if they train, experts by the ep_size of their layers.

    Of a model without experts all that trains is one group.

    We give them explicitly because DeepSpeed's own split of MoE parameters iterates over a set of strings, whose
    order can differ from rank to rank.

    Returns:
        Each group's ``params`` and ``name``; a group of experts also has ``moe: True``, and as its name that of their
        process group.

    Raises:
        UserError: a rank holds no expert that trains, where others do.
    """
    dense = [p for p in model.parameters() if p.requires_grad and not hasattr(p, "allreduce")]
    layers_of_experts = moe_layers(model)
    groups: list[dict[str, Any]] = [{"params": dense, "name": "routers" if layers_of_experts else "weights"}]
    training = [layer for layer in layers_of_experts if layer.experts_train]
    for dims in sorted({layer.dims for layer in training}, key=lambda dims: dims.ep_size):
        layers = [layer for layer in training if layer.dims == dims]
        for place in range(dims.ep_size):
            if not any(layer.trains(number) for layer in layers for number in layer.placement.experts[place]):
                raise UserError(
                    f"parallel.ep_size: in a group of {dims.ep_size} ranks one would hold no expert that trains; "
                    "lower it, or give more new experts"
                )
        experts = [p for layer in layers for p in layer.local_experts.parameters() if p.requires_grad]
        groups.append({"params": experts, "name": dims.expert_group_name, "moe": True})
    return groups


def parameter_counts(
    dense_total: int, mlp: int, hidden_size: int, plan: ExpertPlan, *, new_rows: int = 0, rows_train: bool = True
) -> dict[str, int]:
    """Numbers of parameters before and after the expansion.

    Args:
        dense_total: parameters of the dense model.
        mlp: parameters of one layer's MLP.
        hidden_size: D.
        plan: of the experts.
        new_rows: parameters of rows for new tokens.
        rows_train: whether these train in stage 1.

    Returns:
        ``dense``, ``total`` and ``active`` (used for one token that is routed to K experts) of the whole model;
        ``stage1_trained`` and ``stage2_trained``.
    """
    routers = sum(hidden_size * plan.counts[layer] for layer in plan.moe_layers)
    classifiers = plan.num_groups * hidden_size * len(plan.classifier_layers)
    return {
        "dense": dense_total,
        "total": dense_total + mlp * sum(plan.num_new) + routers + classifiers + new_rows,
        "active": dense_total + mlp * (plan.top_k - 1) * len(plan.moe_layers) + routers + classifiers + new_rows,
        "stage1_trained": mlp * sum(plan.rounds[-1].num_new) + routers + new_rows * rows_train,
        "stage2_trained": routers + classifiers,
    }
