"""What expert parallelism costs in time where a layer's experts do not spread evenly over the ranks of a group."""

from pipeline.distributed.parallel_dims import ParallelDims, imbalance
from pipeline.model.expert_plan import ExpertPlan


def busiest_rank(plan: ExpertPlan, dims: ParallelDims) -> list[float]:
    """For each layer, :func:`pipeline.distributed.parallel_dims.imbalance` as its experts are placed.

    Args:
        plan: of the experts.
        dims: how ranks are divided.
    """
    return [imbalance(num, dims.of_layer(num).ep_size) if num else 1.0 for num in plan.num_new]


def mlp_time(plan: ExpertPlan, dims: ParallelDims) -> float:
    """The mean of :func:`busiest_rank` over layers."""
    factors = busiest_rank(plan, dims)
    return sum(factors) / len(factors)
