"""LoRA (arXiv 2106.09685) by peft: low-rank adapters beside linear maps of a frozen dense model."""

import math

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.config.method import MethodConfig
from pipeline.model.backbone import decoder_layers, find_mlp

ADAPTER = ".lora_"  # in the names of its parameters


def add_adapters(model: PreTrainedModel, method: MethodConfig, seed: int) -> PreTrainedModel:
    """The model with adapters, changed in place. One half of each is zero, so it computes what it did before.

    Args:
        model: the dense model.
        method: the adapters' ``rank``, ``alpha``, ``dropout`` and ``targets``.
        seed: of the other half.
    """
    from peft import LoraConfig, inject_adapter_in_model  # takes a second, and no other method needs it

    assert method.rank is not None and method.alpha is not None and method.dropout is not None
    config = LoraConfig(
        r=method.rank, lora_alpha=method.alpha, lora_dropout=method.dropout, target_modules=_targets(model, method)
    )
    inject_adapter_in_model(config, model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name and not parameter.is_meta:
                bound = 1 / math.sqrt(parameter.shape[1])  # peft's own, torch's of a linear map, but drawn from a seed
                drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
                parameter.copy_(drawn)
    return model


def _targets(model: PreTrainedModel, method: MethodConfig) -> list[str]:
    """The full names of the linear maps that get an adapter."""
    names = []
    for layer_name, layer in model.named_modules():
        if layer not in set(decoder_layers(model)):
            continue
        mlp = f"{find_mlp(layer)}."
        for name, part in layer.named_modules():
            of_mlp = name.startswith(mlp)
            if isinstance(part, nn.Linear) and method.targets in ("all", "mlp" if of_mlp else "attention"):
                names.append(f"{layer_name}.{name}")
    return names


def adapter_names(model: nn.Module, _method: MethodConfig) -> set[str]:
    """The parameters of the adapters."""
    return {name for name, _ in model.named_parameters() if ADAPTER in name}


def without_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its adapters, if it has any, merged into the weights beside them; changed in place."""
    if not any(ADAPTER in name for name, _ in model.named_parameters()):
        return model
    from peft.tuners.lora import LoraLayer

    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
    return model
