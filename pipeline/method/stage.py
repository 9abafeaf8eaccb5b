"""Stage: everything that differs between the stages of training. stage1.py and stage2.py each fill it in."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from data_prep.config import DataConfig, SetConfig
from pipeline.config.run import StageConfig
from pipeline.method.losses import lpr_loss, next_token_loss, router_kl_loss, router_z_loss
from pipeline.model.backbone import install_moe_layers, train_only
from pipeline.model.expert_plan import ExpertPlan
from pipeline.model.moe import Routing

Group = Literal["old", "new"]
Losses = dict[str, tuple[Tensor, float]]  # by name: this micro-batch's part of the global batch's mean, and its weight


@dataclass(frozen=True)
class GlobalBatch:
    """Counts of the batch of one optimizer step, over all ranks and micro-steps; known before its first forward.

    Attributes:
        samples: number of samples.
        sequence_length: tokens per sample.
        old_tokens: how many of its tokens are of old languages.
        base_tokens: how many are of the dense model's languages, if L_LPR protects these alone; else None.
    """

    samples: int
    sequence_length: int
    old_tokens: int
    base_tokens: int | None = None

    @property
    def protected_tokens(self) -> int:
        """Those that L_LPR protects."""
        return self.old_tokens if self.base_tokens is None else self.base_tokens

    @property
    def tokens(self) -> int:
        """All of its tokens."""
        return self.samples * self.sequence_length

    @property
    def new_tokens(self) -> int:
        """Those of new languages."""
        return self.tokens - self.old_tokens


@dataclass(frozen=True)
class MicroBatch:
    """One rank's forward over one micro-batch: what the losses are computed from.

    Attributes:
        logits_BLV: the model's output. The next token's loss takes its memory for the gradient.
        routings: one per MoE layer.
        labels_BL: the next tokens.
        counts_T: false for tokens of samples that only fill up the last micro-step; they count for nothing.
        group_T: the token's group of languages, int64; see :class:`pipeline.model.expert_plan.ExpertPlan`.
        samples: how many samples of this micro-step count, on all ranks together.
        world_size: number of ranks.
    """

    logits_BLV: Tensor
    routings: list[Routing]
    labels_BL: Tensor
    counts_T: Tensor
    group_T: Tensor
    samples: int
    world_size: int


@dataclass(frozen=True)
class Stage(ABC):
    """One stage of training, with the settings that the run gives it.

    Attributes:
        settings: the run's ``stage1`` or ``stage2`` section.
        number: 1 or 2.
        seed_offset: added to the run's seed for the order of samples, so that no two stages share it.
        trains_experts: whether the new experts train. Routers train in every stage.
        has_classifiers: whether the plan's classifier layers have a routing classifier; where they do, it trains.
        uses_zero: whether DeepSpeed's ZeRO-1 runs: the weights that train have fp32 masters, and these and the
            optimizer's moments are divided among the ranks. If not, the weights that train are in fp32 themselves,
            and each rank holds all of the moments.
        starts_from: the number of the stage whose last checkpoint holds the experts, where the run has it; None if
            they are as upcycled.
    """

    settings: StageConfig

    number: ClassVar[int]
    seed_offset: ClassVar[int]
    trains_experts: ClassVar[bool]
    has_classifiers: ClassVar[bool]
    uses_zero: ClassVar[bool]
    starts_from: ClassVar[int | None]

    @property
    def protects_base_only(self) -> bool:
        """Whether L_LPR protects the dense model's languages alone, not those of earlier expansions."""
        return self.settings.lpr_groups == "base"

    @property
    def name(self) -> str:
        """The stage's name in folders, manifests and monitors."""
        return f"stage{self.number}"

    @abstractmethod
    def shares(self) -> dict[Group, float]:
        """The groups of sets that it trains on, and the share of samples that each gets; they sum to 1."""

    @abstractmethod
    def losses(self, micro: MicroBatch, batch: GlobalBatch) -> Losses:
        """Each loss of one micro-batch.

        Args:
            micro: one rank's micro-batch.
            batch: counts of the global batch that it is part of.

        Returns:
            For each loss its part of the global batch's mean (summed over ranks and micro-steps it is that mean)
            and its weight.
        """

    @abstractmethod
    def adapt_ds_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """What it changes in the DeepSpeed config that the run names."""

    @abstractmethod
    def gradient_norm(self, model: nn.Module) -> float | None:
        """The norm of the gradients before clipping; None where DeepSpeed knows it, but only after its step."""

    @abstractmethod
    def begin(self, model: nn.Module) -> None:
        """Note what it needs of the model that it starts from, before a checkpoint of its own is loaded."""

    @abstractmethod
    def end_step(self, model: nn.Module, choices: list[Tensor]) -> None:
        """Change what no gradient changes, after an optimizer step that was not skipped.

        Args:
            model: the stage's.
            choices: by MoE layer, how many active choices of the global batch each expert got, [E].
        """

    @property
    def balances_by_bias(self) -> bool:
        """Whether its routers get a selection bias, which it updates."""
        return False

    def plan_key(self, plan: ExpertPlan) -> str:
        """A content key of the part of the plan that its checkpoints depend on."""
        return plan.key if self.has_classifiers else plan.experts_key

    def sets(self, data: DataConfig) -> dict[str, SetConfig]:
        """The sets that it trains on, by name."""
        groups = {"old": data.old, "new": data.new}
        return {name: entry for group in self.shares() for name, entry in groups[group].items()}

    def install(self, model: PreTrainedModel, plan: ExpertPlan) -> PreTrainedModel:
        """A dense model with all that the stage's model has besides, whose weights are not set: for its shape."""
        install_moe_layers(model, plan, classifiers=self.has_classifiers)
        return model

    def train_only(self, model: nn.Module) -> None:
        """Freeze all of the model except what trains in this stage."""
        train_only(model, experts=self.trains_experts, classifiers=self.has_classifiers)


def mean_next_token_loss(micro: MicroBatch, batch: GlobalBatch) -> Tensor:
    """This micro-batch's part of L_NTP, the mean over the global batch's tokens."""
    mask_BL = micro.counts_T.view_as(micro.labels_BL)
    return next_token_loss(micro.logits_BLV, micro.labels_BL, mask_BL) / batch.tokens


def mean_lpr_loss(
    micro: MicroBatch, batch: GlobalBatch, form: Literal["paper", "reference"], *, only_base: bool
) -> Tensor:
    """This micro-batch's part of L_LPR, the mean over the global batch's tokens of old groups that it protects."""
    loss = lpr_loss(micro.routings, micro.group_T, micro.counts_T, form=form, only_base=only_base)
    return loss / max(1, batch.protected_tokens)


def mean_z_loss(micro: MicroBatch, batch: GlobalBatch) -> Tensor:
    """This micro-batch's part of the router z-loss, the mean over the global batch's tokens."""
    return router_z_loss(micro.routings, micro.counts_T) / batch.tokens


def mean_router_kl(micro: MicroBatch, batch: GlobalBatch) -> Tensor:
    """This micro-batch's part of the routers' KL divergence, the mean over the global batch's new tokens."""
    new_T = micro.group_T == len(micro.routings[0].old_experts)
    return router_kl_loss(micro.routings, new_T & micro.counts_T) / max(1, batch.new_tokens)
