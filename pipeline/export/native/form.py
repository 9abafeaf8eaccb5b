"""What the native forms share: how they are refused, which settings they take over, how experts are written."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from transformers import AutoConfig, PreTrainedModel

from pipeline.export.form import Contents, Form
from pipeline.export.native.mixture import ROPE_TYPES, Mixture
from pipeline.export.tensors import Planned, in_fp32, shared_tensors
from pipeline.model.backbone import named_moe_layers
from pipeline.model.expert_plan import ExpertPlan
from pipeline.model.new_rows import vocabulary_of

TAKEN_OVER = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "tie_word_embeddings",
    "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


@dataclass(frozen=True)
class Names:
    """What an architecture's files call a layer's mixture, and an expert's weights."""

    mixture: str = "mlp"
    gate_proj: str = "gate_proj"
    up_proj: str = "up_proj"
    down_proj: str = "down_proj"

    def prefix(self, layer: int) -> str:
        """Of the names of a layer's mixture."""
        return f"model.layers.{layer}.{self.mixture}"


class NativeForm(Form):
    """An architecture of transformers.

    Attributes:
        name: its ``model_type``.
        architecture: the class of its models.
        families: of dense models whose attention and norms it has.
        rounds_routers: whether transformers loads its routers in the dtype of the other weights.
        names: of its tensors.
    """

    architecture: ClassVar[str]
    families: ClassVar[tuple[str, ...]]
    rounds_routers: ClassVar[bool] = True
    names: ClassVar[Names] = Names()

    def why_not(self, mixture: Mixture) -> str | None:
        """The first thing of a mixture that it can't say; None if it says everything."""
        return next((reason for reason in self._reasons(mixture) if reason), None)

    def _reasons(self, mixture: Mixture) -> Iterator[str | None]:
        """What it can't say, a reason each."""
        rope_type = (getattr(mixture.model.config, "rope_parameters", None) or {}).get("rope_type")
        if mixture.family not in self.families:
            yield f"it does not compute layers as {mixture.family} does"
        if rope_type not in ROPE_TYPES:
            yield f"its positions of the rope_type {rope_type} have not been compared"
        if mixture.plan.classifier == "sequence" and mixture.classifiers:
            yield "it does not classify sequences"

    def contents(self, model: PreTrainedModel, plan: ExpertPlan, dtype: torch.dtype) -> Contents:
        """Settings and tensors by the architecture's names; :meth:`why_not` must have said nothing."""
        mixture = Mixture(model, plan)
        assert self.why_not(mixture) is None
        known = {key: getattr(model.config, key) for key in TAKEN_OVER if hasattr(model.config, key)}
        settings = known | {"vocab_size": vocabulary_of(model)} | self._settings(mixture)
        config = AutoConfig.for_model(self.name, **settings).to_dict() | {"architectures": [self.architecture]}
        rounded = {}
        if self.rounds_routers and dtype != torch.float32:
            rounded = {f"{name}.gate.weight": mixture.router(plan.moe_layers[index])
                       for index, name in enumerate(named_moe_layers(model))}  # fmt: skip
        return Contents(config | self._repeated(config), dict(self._tensors(mixture, dtype)), rounded=rounded)

    @abstractmethod
    def _settings(self, mixture: Mixture) -> dict[str, Any]:
        """What its config says besides ``TAKEN_OVER``."""

    def _repeated(self, config: dict[str, Any]) -> dict[str, Any]:
        """Settings that versions of transformers write under different names."""
        return {}

    def _tensors(self, mixture: Mixture, dtype: torch.dtype) -> Iterator[tuple[str, Planned]]:
        """What is of no MoE layer, then each layer's router and experts."""
        yield from shared_tensors(mixture.model, dtype).items()
        for layer in mixture.plan.moe_layers:
            yield f"{self.names.prefix(layer)}.gate.weight", in_fp32(mixture.router(layer))
            yield from self.experts(mixture, layer, range(mixture.plan.counts[layer]), dtype)

    def experts(
        self, mixture: Mixture, layer: int, numbers: Iterable[int], dtype: torch.dtype
    ) -> Iterator[tuple[str, Planned]]:
        """The tensors of a layer's experts.

        Args:
            mixture: the model.
            layer: which one.
            numbers: for each expert to write, that of the mixture's expert that it is a copy of.
            dtype: of the tensors.
        """
        for place, number in enumerate(numbers):
            for kind, weight in mixture.expert(layer, number).items():
                name = f"{self.names.prefix(layer)}.experts.{place}.{getattr(self.names, kind)}.weight"
                yield name, Planned(tuple(weight.shape), dtype, partial(mixture.take, layer, number, kind, dtype))


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Planned:
    """A tensor of zeros."""
    return Planned(shape, dtype, partial(torch.zeros, shape, dtype=dtype))


def numbers_of_experts(mixture: Mixture) -> str:
    """How many experts the layers have, for a person."""
    counts = sorted(set(mixture.plan.counts))
    return " or ".join(map(str, counts)) if len(counts) < 4 else f"{counts[0]} to {counts[-1]}"


def plain_routers_reasons(mixture: Mixture) -> Iterator[str]:
    """What a router that only takes the top K of its scores can't say."""
    if mixture.classifiers:
        yield f"it has no classifiers, and layer {min(mixture.classifiers)} has one"
    if mixture.selection_biases:
        yield "its routers have no selection biases, by which these experts were balanced"
