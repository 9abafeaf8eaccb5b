"""A mixture as Ernie-4.5-MoE: any numbers of experts, and classifiers that send tokens to expert 0 alone.

Its routers choose the top K of softmax + selection bias, in fp32, and weigh them by their softmax made to sum to 1.
All of its layers have as many experts, so

- a layer with fewer is filled up with copies of expert 0 whose selection bias of -2 keeps them out of every choice;
- a dense layer has equal experts, of which any K make the MLP;
- a classifier is one more copy of expert 0 for each class of tokens that take expert 0 alone. Its score is
  M (k_class - k_new) x with a huge M: where the class wins, its softmax is 1 and all others are 0; where the new
  languages win, it is 0. So a token's output is exactly expert 0's, or exactly that of the router without the copy.

Its rotary embedding turns neighbouring dimensions where Llama turns dimensions of two halves: rows of queries and keys
are written in that order.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pipeline.export.native.form import NativeForm, zeros
from pipeline.export.native.mixture import Mixture
from pipeline.export.tensors import Planned, in_fp32, shared_tensors

KEPT_OUT = -2.0  # the selection bias of an expert that is never chosen: a softmax is at most 1
SHARPNESS = 2.0**40  # M, a power of two, so that multiplying by it rounds nothing


class Ernie(NativeForm):
    """See above. It keeps routers in fp32."""

    name = "ernie4_5_moe"
    architecture = "Ernie4_5_MoeForCausalLM"
    families = ("llama", "mistral", "qwen2")
    rounds_routers = False

    def _reasons(self, mixture: Mixture) -> Iterator[str | None]:
        yield from super()._reasons(mixture)
        if mixture.windows != {None}:
            yield "its attention has no sliding window"
        for layer in mixture.classifiers:
            groups = mixture.plan.old_experts(layer)
            if set(groups) != {1}:
                group = next(number for number, experts in enumerate(groups) if experts > 1)
                yield (
                    f"its routers can send a class of tokens to expert 0 alone, but layer {layer}'s classifier gives "
                    f"those of round {group} the first {groups[group]} experts"
                )
        if mixture.selection_biases and (mixture.classifiers or len(mixture.counts_of_moe_layers) > 1):
            yield (
                "selection biases, by which these experts were balanced, are exact only where its layers need no "
                "copies: with as many experts in each layer and no classifiers"
            )

    def _settings(self, mixture: Mixture) -> dict[str, Any]:
        return {
            "moe_intermediate_size": mixture.model.config.intermediate_size,
            "moe_num_experts": num_experts(mixture),
            "moe_k": mixture.plan.top_k,
            "moe_num_shared_experts": 0,
            "moe_layer_start_index": 0,
            "moe_layer_end_index": mixture.plan.num_layers - 1,
            "moe_layer_interval": 1,
            "use_bias": mixture.has_bias("q_proj"),
        }

    def _tensors(self, mixture: Mixture, dtype: torch.dtype) -> Iterator[tuple[str, Planned]]:
        config = mixture.model.config
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        shared = {name: one for name, one in shared_tensors(mixture.model, dtype).items() if ".mlp." not in name}
        for name, one in shared.items():
            projection = name.split(".")[-2]
            yield name, _interleaved(one, heads[projection]) if projection in heads else one
        if mixture.has_bias("q_proj"):
            yield "lm_head.bias", zeros((shared["model.embed_tokens.weight"].shape[0],), dtype)
            for layer in range(mixture.plan.num_layers):
                name = f"model.layers.{layer}.self_attn.o_proj.bias"
                if name not in shared:
                    yield name, zeros((mixture.hidden_size,), dtype)
        for layer in range(mixture.plan.num_layers):
            prefix, numbers = self.names.prefix(layer), copies(mixture, layer)
            router_ED, bias_E = router_and_bias(mixture, layer)
            yield f"{prefix}.gate.weight", in_fp32(router_ED)
            yield f"{prefix}.moe_statics.e_score_correction_bias", in_fp32(bias_E[None])
            yield from self.experts(mixture, layer, numbers, dtype)


def num_experts(mixture: Mixture) -> int:
    """Of every layer: as many as the layer needs that needs most."""
    classes = {layer: len(weight) - 1 for layer, weight in mixture.classifiers.items()}
    return max(count + classes.get(layer, 0) for layer, count in enumerate(mixture.plan.counts))


def copies(mixture: Mixture, layer: int) -> list[int]:
    """For each of a layer's experts, which one of the mixture's it is a copy of: its own, then copies of expert 0."""
    own = list(range(mixture.plan.counts[layer]))
    return own + [0] * (num_experts(mixture) - len(own))


def router_and_bias(mixture: Mixture, layer: int) -> tuple[Tensor, Tensor]:
    """A layer's router [E, D] and selection bias [E], in fp32."""
    total = num_experts(mixture)
    if layer not in mixture.layers:
        return torch.zeros(total, mixture.hidden_size), torch.zeros(total)
    router = mixture.router(layer)
    bias = mixture.selection_biases.get(layer, torch.zeros(len(router)))
    rows, biases = [router], [bias]
    if layer in mixture.classifiers:
        *old, new = mixture.classifiers[layer]
        differences = torch.stack([one - new for one in old])
        rows.append(SHARPNESS * differences)
        # Classes whose scores are always equal count as the new one.
        biases.append(torch.where(differences.any(-1), 0.0, KEPT_OUT))
    missing = total - sum(map(len, rows))
    rows.append(router[:1].expand(missing, -1))
    biases.append(torch.full((missing,), KEPT_OUT))
    return torch.cat(rows), torch.cat(biases)


def _interleaved(planned: Planned, heads: int) -> Planned:
    """Rows of queries or keys [heads x head_dim, ...], each head's two halves in turn."""

    def make() -> Tensor:
        tensor = planned.make()
        halves = tensor.view(heads, 2, -1, *tensor.shape[1:])
        return halves.transpose(1, 2).reshape(tensor.shape).contiguous()

    return Planned(planned.shape, planned.dtype, make)
