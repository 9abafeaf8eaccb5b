"""A mixture as Mixtral: every layer has as many experts, and attention has no biases."""

from collections.abc import Iterator
from typing import Any

from pipeline.export.native.form import Names, NativeForm, numbers_of_experts, plain_routers_reasons
from pipeline.export.native.mixture import Mixture


class Mixtral(NativeForm):
    """Its router is ours: softmax, the top K, and their weights made to sum to 1."""

    name = "mixtral"
    architecture = "MixtralForCausalLM"
    families = ("llama", "mistral")
    names = Names("block_sparse_moe", "w1", "w3", "w2")

    def _reasons(self, mixture: Mixture) -> Iterator[str | None]:
        yield from super()._reasons(mixture)
        if len(set(mixture.plan.counts)) > 1:
            yield f"it has as many experts in every layer, and these have {numbers_of_experts(mixture)}"
        yield from plain_routers_reasons(mixture)
        if mixture.has_bias("q_proj"):
            yield "its attention has no biases"

    def _settings(self, mixture: Mixture) -> dict[str, Any]:
        (window,) = mixture.windows
        return {
            "num_local_experts": mixture.plan.counts[0],
            "num_experts_per_tok": mixture.plan.top_k,
            "sliding_window": window,
        }
