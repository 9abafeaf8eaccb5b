"""The model of a run before its first step, over which its checkpoints are laid; how any of them is loaded."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from common.errors import UserError
from pipeline.checkpoint.store import read_manifest
from pipeline.checkpoint.verify import check_sound
from pipeline.checkpoint.weights import Reading, files_read_once, read_weights
from pipeline.config.method import MethodConfig
from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.distributed.process_group import Ranks
from pipeline.method.dense import extend
from pipeline.method.upcycle import load_upcycled
from pipeline.model.backbone import ONE_RANK, load_dense, parameter_counts
from pipeline.model.expert_plan import ExpertPlan
from pipeline.model.model_folder import model_config
from pipeline.records.checkpoint import UPCYCLED_TAG, UpcycledManifest


class Untrained(ABC):
    """What a run's checkpoints are laid over: the upcycled mixture, or a baseline's dense model."""

    @property
    @abstractmethod
    def key(self) -> dict[str, Any]:
        """What names its weights, as JSON holds it."""

    @abstractmethod
    def check(self, ranks: Ranks, dims: ParallelDims) -> None:
        """Verify its files on all ranks, before training.

        Raises:
            AgreedError: some are damaged.
        """

    @abstractmethod
    def load(
        self,
        dtype: torch.dtype,
        dims: ParallelDims = ONE_RANK,
        *,
        checkpoints: Sequence[Path] = (),
        classifiers: bool = False,
        selection_biases: bool = False,
        reading: Reading = "each",
    ) -> PreTrainedModel:
        """The model with its own weights, or those of checkpoints; see :func:`pipeline.method.upcycle.load_upcycled`.

        Raises:
            UserError: a file is missing or does not fit.
        """

    @abstractmethod
    def parameter_counts(self) -> dict[str, int]:
        """Numbers of parameters by kind, see :func:`pipeline.model.backbone.parameter_counts`."""


@dataclass(frozen=True)
class UntrainedMixture(Untrained):
    """The upcycled checkpoint.

    Attributes:
        folder: where it lies.
        plan: its experts.
        fix: what a user can do about a damaged file.
    """

    folder: Path
    plan: ExpertPlan
    fix: str = "upcycle again with --force"

    @property
    def key(self) -> dict[str, Any]:
        """Its folder's name, which is a content key."""
        return {"upcycled": self.folder.name}

    def check(self, ranks: Ranks, dims: ParallelDims) -> None:
        """Verify all of its files; each rank those that it loads."""
        loads = [f"{UPCYCLED_TAG}/{name}" for name in files_read_once(self.plan, dims)]
        check_sound(self.folder, ranks, self.fix, loads=loads)

    def load(
        self,
        dtype: torch.dtype,
        dims: ParallelDims = ONE_RANK,
        *,
        checkpoints: Sequence[Path] = (),
        classifiers: bool = False,
        selection_biases: bool = False,
        reading: Reading = "each",
    ) -> PreTrainedModel:
        """The MoE model; each rank gets its own experts only."""
        return load_upcycled(
            self.folder, self.plan, dtype, dims,
            checkpoints=checkpoints, classifiers=classifiers, selection_biases=selection_biases, reading=reading,
        )  # fmt: skip

    def parameter_counts(self) -> dict[str, int]:
        """By what its manifest says of the dense model."""
        known = read_manifest(self.folder, UpcycledManifest)
        sizes = (known.dense_parameters, known.mlp_parameters, known.hidden_size)
        rows_train = known.new_rows is None or known.new_rows.train
        return parameter_counts(*sizes, self.plan, new_rows=known.new_row_parameters, rows_train=rows_train)


@dataclass(frozen=True)
class UntrainedDense(Untrained):
    """A dense model with what a baseline adds to it.

    Attributes:
        folder: of the dense model.
        model_hash: a content key of it.
        method: which baseline.
        seed: of what the baseline draws at random.
    """

    folder: Path
    model_hash: str
    method: MethodConfig
    seed: int

    @property
    def key(self) -> dict[str, Any]:
        """The dense model, the method, and the seed."""
        return {"dense": self.model_hash, "method": self.method.model_dump(mode="json"), "seed": self.seed}

    def check(self, ranks: Ranks, dims: ParallelDims) -> None:
        """Nothing: a stage's inputs hold a hash of the dense model's files."""

    def load(
        self,
        dtype: torch.dtype,
        dims: ParallelDims = ONE_RANK,
        *,
        checkpoints: Sequence[Path] = (),
        classifiers: bool = False,
        selection_biases: bool = False,
        reading: Reading = "each",
    ) -> PreTrainedModel:
        """The extended model, whole on each rank; it has neither classifiers nor selection biases.

        Raises:
            UserError: a checkpoint lacks a parameter that trains.
        """
        model = extend(load_dense(self.folder, dtype), self.method, self.seed)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        how: Reading = "mapped" if reading == "mapped" else "each"  # what a checkpoint holds is as large as the model
        for tag in checkpoints:
            missing = sorted(trained & read_weights(model, tag, reading=how))
            if missing:
                raise UserError(f"{tag}: {missing[0]} is missing; it is of another method: train again with --force")
        return model

    def parameter_counts(self) -> dict[str, int]:
        """Counted on a model without memory."""
        return dense_parameter_counts(model_config(self.folder), self.method)


def dense_parameter_counts(config: Any, method: MethodConfig) -> dict[str, int]:
    """Numbers of parameters of a dense model and of what a baseline makes of it; all of them are active.

    Args:
        config: the dense model's Hugging Face config.
        method: which baseline.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        model.tie_weights()
        dense = sum(parameter.numel() for parameter in model.parameters())
        parameters = list(extend(model, method, seed=0).parameters())
    total = sum(parameter.numel() for parameter in parameters)
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return {"dense": dense, "total": total, "active": total, "stage1_trained": trained}
