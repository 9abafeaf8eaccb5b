"""A mixture as Qwen2-MoE or Qwen3-MoE: its layers are dense or have all as many experts."""

from collections.abc import Iterator
from typing import Any

import torch

from pipeline.export.native.form import NativeForm, numbers_of_experts, plain_routers_reasons, zeros
from pipeline.export.native.mixture import Mixture
from pipeline.export.tensors import Planned

SHARED_SIZE = 64  # of Qwen2-MoE's shared expert, of which there must be one


class QwenMoe(NativeForm):
    """What the two have in common."""

    def _reasons(self, mixture: Mixture) -> Iterator[str | None]:
        yield from super()._reasons(mixture)
        if len(mixture.counts_of_moe_layers) > 1:
            yield f"all its layers with a router have as many experts, and these have {numbers_of_experts(mixture)}"
        yield from plain_routers_reasons(mixture)

    def _settings(self, mixture: Mixture) -> dict[str, Any]:
        (num_experts,) = mixture.counts_of_moe_layers
        return {
            "num_experts": num_experts,
            "num_experts_per_tok": mixture.plan.top_k,
            "norm_topk_prob": True,
            "moe_intermediate_size": mixture.model.config.intermediate_size,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [layer for layer, count in enumerate(mixture.plan.counts) if count == 1],
        }

    def _repeated(self, config: dict[str, Any]) -> dict[str, Any]:
        number = config.get("num_experts", config.get("num_local_experts"))
        return {"num_experts": number, "num_local_experts": number}


class Qwen2Moe(QwenMoe):
    """Its shared expert, which every token takes besides, is one of zeros here."""

    name = "qwen2_moe"
    architecture = "Qwen2MoeForCausalLM"
    families = ("llama", "mistral", "qwen2")

    def _reasons(self, mixture: Mixture) -> Iterator[str | None]:
        yield from super()._reasons(mixture)
        if mixture.has_bias("o_proj"):
            yield "its attention's output has no bias"
        if mixture.windows != {None}:
            yield "not all of its attention knows sliding windows"

    def _settings(self, mixture: Mixture) -> dict[str, Any]:
        return super()._settings(mixture) | {
            "qkv_bias": mixture.has_bias("q_proj"),
            "shared_expert_intermediate_size": SHARED_SIZE,
            "use_sliding_window": False,
        }

    def _tensors(self, mixture: Mixture, dtype: torch.dtype) -> Iterator[tuple[str, Planned]]:
        yield from super()._tensors(mixture, dtype)
        size = mixture.hidden_size
        for layer in mixture.plan.moe_layers:
            prefix = self.names.prefix(layer)
            for kind, shape in (("gate_proj", (SHARED_SIZE, size)), ("up_proj", (SHARED_SIZE, size)),
                                ("down_proj", (size, SHARED_SIZE))):  # fmt: skip
                yield f"{prefix}.shared_expert.{kind}.weight", zeros(shape, dtype)
            yield f"{prefix}.shared_expert_gate.weight", zeros((1, size), dtype)


class Qwen3Moe(QwenMoe):
    """It normalizes queries and keys, as Qwen3 does."""

    name = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"
    families = ("qwen3",)

    def _reasons(self, mixture: Mixture) -> Iterator[str | None]:
        yield from super()._reasons(mixture)
        if len(mixture.windows) > 1:
            yield "its layers all have a sliding window or none, and here some have one"

    def _settings(self, mixture: Mixture) -> dict[str, Any]:
        (window,) = mixture.windows
        return super()._settings(mixture) | {
            "attention_bias": mixture.has_bias("q_proj"),
            "sliding_window": window,
            "use_sliding_window": window is not None,
        }
