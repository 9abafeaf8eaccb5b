"""ParallelDims: how many ranks there are, how experts are spread over them, and which rank this is."""

import math
from dataclasses import dataclass, field, replace

from common.errors import UserError
from pipeline.config.run import ParallelConfig
from pipeline.records.checkpoint import CheckpointManifest

MAX_IMBALANCE = ParallelConfig().max_imbalance


@dataclass(frozen=True)
class ParallelDims:
    """The degrees of parallelism, checked when they are made; ``world_size = num_replicas x ep_size``.

    Consecutive ranks form expert-parallel groups of ``ep_size``. Each group holds all new experts of a layer once. The
    ranks with the same place in their groups hold the same experts: DeepSpeed calls them expert-data-parallel.

    A layer with few new experts is divided into smaller groups, see :meth:`of_layer`: its experts are replicated
    inside a group of the run.

    Attributes:
        world_size: number of ranks.
        ep_size: ranks per expert-parallel group.
        rank: this rank; 0 where only the shape matters. Two values of the same shape are equal, whatever their rank.
        max_imbalance: how many times the mean rank's rows the busiest rank of a layer may compute.

    Raises:
        UserError: ``ep_size`` does not divide the number of ranks.
    """

    world_size: int
    ep_size: int
    rank: int = field(default=0, compare=False)
    max_imbalance: float = MAX_IMBALANCE

    def __post_init__(self) -> None:
        """Check the product."""
        assert 0 <= self.rank < max(1, self.world_size), f"rank {self.rank} of {self.world_size}"
        if self.world_size < 1 or self.ep_size < 1 or self.world_size % self.ep_size:
            raise UserError(
                f"parallel.ep_size: {self.ep_size} does not divide the number of ranks, {self.world_size}; start a "
                f"multiple of {self.ep_size} ranks, or use --set parallel.ep_size={self._largest_that_divides()}"
            )

    @classmethod
    def that_saved(cls, manifest: CheckpointManifest) -> "ParallelDims":
        """The shape of the ranks that saved a checkpoint."""
        return cls(manifest.ranks, manifest.ep_size, max_imbalance=manifest.max_imbalance)

    @classmethod
    def from_options(cls, ranks: int, ep_size: int) -> "ParallelDims":
        """The shape that the options ``--ranks`` and ``--ep-size`` ask for.

        Raises:
            UserError: they do not fit each other; the line names the options.
        """
        if ranks < 1 or ep_size < 1 or ranks % ep_size:
            raise UserError(
                f"ranks {ranks}, ep_size {ep_size}: the ranks must be a multiple of ep_size, and both at least 1; "
                "change --ranks or --ep-size"
            )
        return cls(ranks, ep_size)

    @property
    def num_replicas(self) -> int:
        """How many ranks hold the same expert: DeepSpeed's expert-data-parallel world size."""
        return self.world_size // self.ep_size

    @property
    def ep_rank(self) -> int:
        """This rank's place in its expert-parallel group."""
        return self.rank % self.ep_size

    @property
    def edp_rank(self) -> int:
        """This rank's place among the ranks that hold the same experts: the number of its expert-parallel group."""
        return self.rank // self.ep_size

    @property
    def expert_group_name(self) -> str:
        """The name under which DeepSpeed keeps the process groups of the experts."""
        return f"ep_size_{self.ep_size}"

    def of_layer(self, num_new: int) -> "ParallelDims":
        """The same ranks, divided for a layer of so many new experts.

        Its groups are the largest that divide those of the run, leave no rank without an expert, and keep to
        ``max_imbalance``. Groups of one rank, which send nothing, always do.
        """
        sizes = (size for size in range(min(self.ep_size, num_new), 0, -1) if self.ep_size % size == 0)
        return replace(self, ep_size=next(size for size in sizes if imbalance(num_new, size) <= self.max_imbalance))

    def at_rank(self, rank: int) -> "ParallelDims":
        """The same shape, as another rank sees it."""
        return replace(self, rank=rank)

    def _largest_that_divides(self) -> int:
        return math.gcd(self.ep_size, self.world_size) if self.world_size > 0 and self.ep_size > 0 else 1


def imbalance(num_new: int, ep_size: int) -> float:
    """The rows that a layer's busiest rank computes as a multiple of the mean rank's, if routing is uniform.

    Every layer waits at its all-to-all, so this is also the time of its MLPs as a multiple of that at ep_size 1. Each
    rank keeps the rows of expert 0; those of a new expert come from its whole group to the rank that holds it.

    Args:
        num_new: the layer's experts besides expert 0.
        ep_size: ranks per group of this layer.
    """
    return (1 + ep_size * math.ceil(num_new / ep_size)) / (1 + num_new)
