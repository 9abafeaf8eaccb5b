"""Stage 2: routers and classifiers review all languages (MoE-LPR, arXiv 2408.11396, section 3.3).

The classifiers are LayerMoE's (arXiv 2505.22582, section 3.3).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pipeline.config.run import Stage2Config
from pipeline.method.losses import classifier_loss
from pipeline.method.stage import (
    GlobalBatch,
    Group,
    Losses,
    MicroBatch,
    Stage,
    mean_lpr_loss,
    mean_next_token_loss,
    mean_router_kl,
    mean_z_loss,
)
from pipeline.model.backbone import moe_layers


@dataclass(frozen=True)
class Stage2(Stage):
    """L = L_NTP + gamma L_LPR + gamma_c L_cls, on a replay of old and new languages; all experts are frozen."""

    settings: Stage2Config

    number: ClassVar[int] = 2
    seed_offset: ClassVar[int] = 1
    trains_experts: ClassVar[bool] = False
    has_classifiers: ClassVar[bool] = True
    uses_zero: ClassVar[bool] = False
    starts_from: ClassVar[int | None] = 1

    def shares(self) -> dict[Group, float]:
        """``old_share`` of the samples are of old sets."""
        return {"old": self.settings.old_share, "new": 1 - self.settings.old_share}

    def losses(self, micro: MicroBatch, batch: GlobalBatch) -> Losses:
        """L_NTP; L_LPR, a mean over old tokens, with the weight gamma; L_cls, over all tokens, with gamma_c.

        And, if they have a weight, the router z-loss, and over new tokens the KL divergence from stage 1's routers.
        """
        classifier = classifier_loss(micro.routings, micro.group_T, micro.counts_T) / batch.tokens
        lpr = mean_lpr_loss(micro, batch, self.settings.lpr, only_base=self.protects_base_only)
        losses = {
            "next_token": (mean_next_token_loss(micro, batch), 1.0),
            "lpr": (lpr, self.settings.lpr_weight),
            "classifier": (classifier, self.settings.classifier_weight),
        }
        if self.settings.z_loss_weight:
            losses["router_z"] = (mean_z_loss(micro, batch), self.settings.z_loss_weight)
        if self.settings.router_kl_weight:
            losses["router_kl"] = (mean_router_kl(micro, batch), self.settings.router_kl_weight)
        return losses

    def begin(self, model: nn.Module) -> None:
        """Where new tokens are held to stage 1's routing, routers keep a copy of themselves as stage 1 left them."""
        if self.settings.router_kl_weight:
            for layer in moe_layers(model):
                layer.router.keep_reference()

    def end_step(self, model: nn.Module, choices: list[Tensor]) -> None:
        """Nothing: a selection bias stays as stage 1 left it."""

    def adapt_ds_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """Without ZeRO, which asserts that experts train, and without bf16: the few weights that train stay in fp32.

        The frozen weights stay in the precision in which they were loaded.
        """
        return {key: value for key, value in config.items() if key not in ("bf16", "data_types", "zero_optimization")}

    def gradient_norm(self, model: nn.Module) -> float | None:
        """Of all routers and classifiers; every rank holds the same gradients."""
        gradients = [p.grad.float() for p in model.parameters() if p.requires_grad and p.grad is not None]
        return float(torch.stack([gradient.norm() for gradient in gradients]).norm())
