"""The only stage of a baseline: a dense model learns the new languages."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn
from transformers import PreTrainedModel

from common.files import content_key
from pipeline.config.method import MethodConfig
from pipeline.method.dense import extend, train_only
from pipeline.method.stage import GlobalBatch, Losses, MicroBatch, mean_next_token_loss
from pipeline.method.stage1 import Stage1
from pipeline.model.expert_plan import ExpertPlan


@dataclass(frozen=True)
class DenseStage(Stage1):
    """L = L_NTP on the samples that stage 1 of the mixture reads; what trains is the method's.

    Attributes:
        method: the run's ``method``.
    """

    method: MethodConfig = field(kw_only=True)

    trains_experts: ClassVar[bool] = False

    def losses(self, micro: MicroBatch, batch: GlobalBatch) -> Losses:
        """L_NTP alone: there are no routers."""
        return {"next_token": (mean_next_token_loss(micro, batch), 1.0)}

    @property
    def balances_by_bias(self) -> bool:
        """Never."""
        return False

    def plan_key(self, plan: ExpertPlan) -> str:
        """A content key of the method: it is what checkpoints depend on besides the dense model."""
        return content_key(self.method.model_dump(mode="json"))

    def install(self, model: PreTrainedModel, plan: ExpertPlan) -> PreTrainedModel:
        """The dense model with all that the method adds."""
        return extend(model, self.method, seed=0)

    def train_only(self, model: nn.Module) -> None:
        """Freeze all of the model except what the method trains."""
        train_only(model, self.method)
