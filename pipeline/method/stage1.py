"""Stage 1: new experts and routers learn the new languages (MoE-LPR, arXiv 2408.11396, section 3.2)."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from pipeline.config.run import Stage1Config
from pipeline.method.losses import load_balancing_loss
from pipeline.method.stage import (
    GlobalBatch,
    Group,
    Losses,
    MicroBatch,
    Stage,
    mean_lpr_loss,
    mean_next_token_loss,
    mean_z_loss,
)
from pipeline.model.backbone import moe_layers


@dataclass(frozen=True)
class Stage1(Stage):
    """L = L_NTP + alpha L_balance, on the new languages alone; all but new experts and routers is frozen.

    Where the run gives it a share of old samples, these may add gamma L_LPR, as in stage 2.
    """

    settings: Stage1Config

    number: ClassVar[int] = 1
    seed_offset: ClassVar[int] = 0
    trains_experts: ClassVar[bool] = True
    has_classifiers: ClassVar[bool] = False
    uses_zero: ClassVar[bool] = True
    starts_from: ClassVar[int | None] = None

    def shares(self) -> dict[Group, float]:
        """All samples are of new sets, except for the run's ``old_share``."""
        old = self.settings.old_share
        return {"old": old, "new": 1 - old} if old else {"new": 1.0}

    def losses(self, micro: MicroBatch, batch: GlobalBatch) -> Losses:
        """L_NTP; L_balance with the weight alpha, unless a bias balances; L_LPR and the router z-loss, if weighted."""
        losses = {"next_token": (mean_next_token_loss(micro, batch), 1.0)}
        if not self.balances_by_bias:
            losses["balance"] = (self._balance(micro, batch), self.settings.balance_weight)
        if self.settings.lpr_weight:
            lpr = mean_lpr_loss(micro, batch, self.settings.lpr, only_base=self.protects_base_only)
            losses["lpr"] = (lpr, self.settings.lpr_weight)
        if self.settings.z_loss_weight:
            losses["router_z"] = (mean_z_loss(micro, batch), self.settings.z_loss_weight)
        return losses

    def _balance(self, micro: MicroBatch, batch: GlobalBatch) -> Tensor:
        """This micro-batch's part of L_balance of the global batch."""
        balance = load_balancing_loss(
            micro.routings,
            mask_T=micro.counts_T,
            scale=self.settings.balance_scale,
            statistics=self.settings.balance_statistics,
        )  # a mean already: over this rank's tokens
        return balance * self._share(micro, batch) / micro.world_size

    @property
    def balances_by_bias(self) -> bool:
        """Where the run asks for ``balance: bias``."""
        return self.settings.balance == "bias"

    def end_step(self, model: nn.Module, choices: list[Tensor]) -> None:
        """Update the routers' selection biases, where these balance."""
        if self.balances_by_bias:
            for layer, choices_E in zip(moe_layers(model), choices, strict=True):
                layer.router.balance(choices_E, self.settings.bias_update_rate)

    def begin(self, model: nn.Module) -> None:
        """Nothing: it is held to no earlier routing."""

    def _share(self, micro: MicroBatch, batch: GlobalBatch) -> float:
        """The part of the global batch that the balance loss stands for: the micro-step's samples on all ranks.

        With local statistics it is this rank's samples, as if all ranks had as many.
        """
        if self.settings.balance_statistics == "local":
            return float(micro.counts_T.sum()) / batch.sequence_length * micro.world_size / batch.samples
        return micro.samples / batch.samples

    def adapt_ds_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """Nothing: the run's config is for this stage."""
        return config

    def gradient_norm(self, model: nn.Module) -> float | None:
        """DeepSpeed's ZeRO measures it in its step, over all ranks."""
        return None
