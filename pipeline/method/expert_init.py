"""What new experts begin as: copies of their layer's MLP, exact, partly drawn anew, or with noise; or random."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from common.seeded import seeded_hash
from pipeline.config.experts import ExpertsConfig
from pipeline.model.moe.experts import fused_weights


@dataclass(frozen=True)
class ExpertInit:
    """How the weights of a new expert follow from those of its layer's MLP.

    Attributes:
        kind: ``copy``, ``random``, or ``drop`` for :func:`drop_upcycled`.
        drop_ratio: the share that ``drop`` draws anew.
        noise: for ``copy``, the standard deviation of the noise that is added, relative to the weights'.
    """

    kind: Literal["copy", "random", "drop"] = "copy"
    drop_ratio: float = 0.5
    noise: float = 0.0

    @classmethod
    def of(cls, settings: ExpertsConfig) -> "ExpertInit":
        """What a run asks for."""
        return cls(settings.init, settings.drop_ratio, settings.noise)

    @property
    def copies(self) -> bool:
        """Whether they are exact copies, so that they need no files and the model computes what the dense one does."""
        return self.kind == "copy" and not self.noise

    def weights(self, mlp: Mapping[str, Tensor], spread: float, generator: torch.Generator) -> dict[str, Tensor]:
        """One expert's weights under the names of :class:`pipeline.model.moe.experts.Expert`.

        Args:
            mlp: the MLP's ``state_dict``.
            spread: the standard deviation of random weights.
            generator: of the random numbers.
        """
        if self.kind == "drop":
            mlp = drop_upcycled(mlp, self.drop_ratio, generator)
        elif self.noise:
            mlp = with_noise(mlp, self.noise, generator)
        weights = fused_weights(mlp)
        if self.kind == "random":
            return {name: weight.clone().normal_(0, spread, generator=generator) for name, weight in weights.items()}
        return weights


def expert_generator(seed: int, moe_layer: int, number: int) -> torch.Generator:
    """The random numbers of one new expert, whatever other experts there are.

    Args:
        seed: of the run.
        moe_layer: number of the layer among those with a router.
        number: of the expert among the layer's new ones, from 0.
    """
    return torch.Generator().manual_seed(seeded_hash(seed, "expert", moe_layer, number))


def drop_upcycled(mlp: Mapping[str, Tensor], ratio: float, generator: torch.Generator) -> dict[str, Tensor]:
    """A copy of an MLP of whose intermediate dimensions a share is drawn anew (Drop-Upcycling, arXiv 2502.19261).

    Section 3 there. The dimensions are the same in all three matrices: rows of gate and up as torch stores them,
    columns of down. Each matrix draws from a normal distribution with the mean and standard deviation of its weights
    that are replaced. Biases stay.

    Args:
        mlp: the MLP's ``state_dict``.
        ratio: the share, of which the whole part in dimensions is taken; 1 replaces all.
        generator: of the random numbers.
    """
    size = len(mlp["gate_proj.weight"])
    dimensions = torch.randperm(size, generator=generator)[: int(size * ratio)]
    changed = dict(mlp)
    if not len(dimensions):
        return changed
    for name, axis in (("gate_proj.weight", 0), ("up_proj.weight", 0), ("down_proj.weight", 1)):
        replaced = mlp[name].index_select(axis, dimensions).float()
        mean, deviation = float(replaced.mean()), float(replaced.std())
        drawn = torch.empty_like(replaced).normal_(mean, deviation, generator=generator)
        changed[name] = mlp[name].index_copy(axis, dimensions, drawn.to(mlp[name].dtype))
    return changed


def with_noise(mlp: Mapping[str, Tensor], noise: float, generator: torch.Generator) -> dict[str, Tensor]:
    """A copy of an MLP with Gaussian noise on each matrix, ``noise`` times as wide as its weights. Biases stay."""
    changed = dict(mlp)
    for name in ("gate_proj.weight", "up_proj.weight", "down_proj.weight"):
        weight = mlp[name].float()
        drawn = torch.empty_like(weight).normal_(0, 1, generator=generator)
        changed[name] = weight.add(drawn, alpha=noise * float(weight.std())).to(mlp[name].dtype)
    return changed
