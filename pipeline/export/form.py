"""The forms that a trained model can be written in, and what a folder of any of them holds."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.export.tensors import Planned
from pipeline.model.expert_plan import ExpertPlan


@dataclass(frozen=True)
class Contents:
    """What a folder holds besides tokenizer and card.

    Attributes:
        config: of config.json, without the dtype.
        tensors: by name, in the order in which they are written.
        class_names: what the words of the Python files stand for; None for a folder without Python files.
        rounded: by parameter of the loaded model, routers in fp32 that transformers rounds when it loads the folder
            in another dtype; their rows are those of the experts.
    """

    config: dict[str, Any]
    tensors: Mapping[str, Planned]
    class_names: Mapping[str, str] | None = None
    rounded: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """How many numbers the tensors hold."""
        return sum(one.size for one in self.tensors.values())


class Form(ABC):
    """A form that a trained model can be written in."""

    name: ClassVar[str]

    @abstractmethod
    def contents(self, model: PreTrainedModel, plan: ExpertPlan, dtype: torch.dtype) -> Contents:
        """What its folder holds.

        Args:
            model: the mixture, whole on one rank, or a dense model.
            plan: of its experts.
            dtype: of the weights, routers aside, which stay in fp32.

        Raises:
            UserError: the form can't say this model.
        """
