"""A trained mixture as the native forms look at it."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.model.backbone import decoder_layers, find_mlp, moe_layers
from pipeline.model.expert_plan import ExpertPlan
from pipeline.model.moe import MoELayer
from pipeline.model.moe.experts import projections

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")  # those that tests compare


@dataclass(frozen=True)
class Mixture:
    """The trained model and its plan, with what the forms ask about them.

    Attributes:
        model: with its MoE layers, whole on one rank.
        plan: of its experts.
    """

    model: PreTrainedModel
    plan: ExpertPlan

    @property
    def family(self) -> str:
        """The dense model's ``model_type``."""
        return str(self.model.config.model_type)

    @cached_property
    def layers(self) -> dict[int, MoELayer]:
        """The MoE layers, by the number of their decoder layer."""
        return dict(zip(self.plan.moe_layers, moe_layers(self.model), strict=True))

    @property
    def counts_of_moe_layers(self) -> set[int]:
        """Which numbers of experts its MoE layers have."""
        return {self.plan.counts[layer] for layer in self.plan.moe_layers}

    @cached_property
    def classifiers(self) -> dict[int, Tensor]:
        """By layer, its classifier's weight [C, D] in fp32, the class of the new languages last."""
        found = {layer: one.router.classifier for layer, one in self.layers.items()}
        return {layer: one.weight.detach().float() for layer, one in found.items() if one is not None}

    @cached_property
    def selection_biases(self) -> dict[int, Tensor]:
        """By layer, its selection bias [N_l] in fp32; none where experts were balanced by a loss."""
        found = {layer: one.router.selection_bias for layer, one in self.layers.items()}
        return {layer: one.detach().float() for layer, one in found.items() if one is not None}

    def router(self, layer: int) -> Tensor:
        """A MoE layer's router weight [N_l, D], a copy in fp32."""
        return self.layers[layer].router.wg.weight.detach().float().clone()

    def has_bias(self, projection: str) -> bool:
        """Whether attention's ``q_proj`` or ``o_proj`` has a bias."""
        return any(name.endswith(f".{projection}.bias") for name, _ in self.model.named_parameters())

    @property
    def windows(self) -> set[int | None]:
        """How far back the layers look; None for all positions, also where the window is as long as these are."""
        config = self.model.config
        window = getattr(config, "sliding_window", None) if self.family != "llama" else None
        if window is None or window >= config.max_position_embeddings:
            return {None}
        if self.family == "mistral":  # which has it in all layers
            return {window}
        return {window if kind == "sliding_attention" else None for kind in config.layer_types}

    def expert(self, layer: int, number: int) -> dict[str, Tensor]:
        """An expert's weights, not copied, by ``gate_proj``, ``up_proj`` [F, D] and ``down_proj`` [D, F]."""
        if number:
            expert = self.layers[layer].local_experts.experts[number - 1]
            gate, up = expert.gate_up_proj.detach().chunk(2)
            return {"gate_proj": gate, "up_proj": up, "down_proj": expert.down_proj.detach()}
        decoder_layer = decoder_layers(self.model)[layer]
        mlp = self.layers[layer].base_mlp if layer in self.layers else getattr(decoder_layer, find_mlp(decoder_layer))
        weights = (linear.weight.detach() for linear in projections(mlp))
        return dict(zip(("gate_proj", "up_proj", "down_proj"), weights, strict=True))

    def take(self, layer: int, number: int, kind: str, dtype: torch.dtype) -> Tensor:
        """A copy of one of :meth:`expert`'s weights, once: the model then lets go of it.

        Not of expert 0's, of which there may be several copies. Gate and up are one weight, which goes with up.
        """
        taken = self.expert(layer, number)[kind].to(dtype, copy=True).contiguous()
        if number and kind != "gate_proj":
            expert = self.layers[layer].local_experts.experts[number - 1]
            parameter = expert.down_proj if kind == "down_proj" else expert.gate_up_proj
            parameter.data = parameter.data.new_empty(0)
        return taken

    @property
    def hidden_size(self) -> int:
        """D."""
        return int(self.model.config.hidden_size)
