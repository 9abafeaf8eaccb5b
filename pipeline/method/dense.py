"""The baselines: a dense model that trains in full, by adapters (LoRA), or by new blocks (LLaMA Pro).

Each adds to the model what it trains, without changing what the model computes, and names the parameters that train.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from torch import nn
from transformers import PreTrainedModel

from common.errors import UserError
from pipeline.config.method import MethodConfig
from pipeline.method.llama_pro import add_blocks, names_of_new_blocks, sources
from pipeline.method.lora import adapter_names, add_adapters


@dataclass(frozen=True)
class DenseMethod:
    """One baseline.

    Attributes:
        extend: adds to a dense model what trains; given the model, the run's ``method`` and its seed, it returns the
            model, which may be another one and computes what the dense one does.
        trains: given the extended model and ``method``, the names of the parameters that train.
    """

    extend: Callable[[PreTrainedModel, MethodConfig, int], PreTrainedModel]
    trains: Callable[[nn.Module, MethodConfig], set[str]]


def extend(model: PreTrainedModel, method: MethodConfig, seed: int) -> PreTrainedModel:
    """A dense model with all that a baseline adds to it, of which only what trains is not frozen.

    Args:
        model: the dense model; it may be changed in place.
        method: which baseline.
        seed: of weights that are random.

    Raises:
        UserError: the method does not fit the model.
    """
    extended = DENSE[method.name].extend(model, method, seed)
    train_only(extended, method)
    return extended


def check_dense(method: MethodConfig, num_layers: int) -> None:
    """What can be known of a baseline before a model is loaded.

    Args:
        method: which baseline.
        num_layers: of the dense model.

    Raises:
        UserError: it does not fit the model, or needs a package that is not installed.
    """
    if method.name == "lora" and find_spec("peft") is None:
        raise UserError("method: lora needs peft, which is not installed; pip install peft")
    if method.blocks is not None:
        sources(num_layers, method.blocks)


def train_only(model: nn.Module, method: MethodConfig) -> None:
    """Freeze all of an extended model but what a baseline trains."""
    names = DENSE[method.name].trains(model, method)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)


def _nothing_added(model: PreTrainedModel, _method: MethodConfig, _seed: int) -> PreTrainedModel:
    return model


def _all(model: nn.Module, _method: MethodConfig) -> set[str]:
    return {name for name, _ in model.named_parameters()}


DENSE: dict[str, DenseMethod] = {
    "full": DenseMethod(_nothing_added, _all),
    "lora": DenseMethod(add_adapters, adapter_names),
    "llama_pro": DenseMethod(add_blocks, names_of_new_blocks),
}
