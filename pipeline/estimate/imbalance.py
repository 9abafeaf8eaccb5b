"""What expert parallelism costs in time where a layer's experts do not spread evenly over the ranks of a group."""

from pipeline.model.expert_plan import ExpertPlan


def busiest_rank(plan: ExpertPlan, ep_size: int) -> list[float]:
    """For each layer, the rows of the busiest rank's MLPs as a multiple of the mean rank's.

    Routing is taken to be uniform. Every layer waits at its all-to-all, so this is also the layer's MLP time as a
    multiple of that at ep_size 1. Of a layer's rows each rank keeps those of expert 0, 1 / N_l; those of a new expert
    come from all of the group to the rank that holds it.

    Args:
        plan: of the experts.
        ep_size: ranks per expert-parallel group.
    """
    placement = plan.placement(ep_size)
    return [
        (1 + ep_size * max(map(len, placement[layer]))) / count if count > 1 else 1.0
        for layer, count in enumerate(plan.counts)
    ]


def mlp_time(plan: ExpertPlan, ep_size: int) -> float:
    """The mean of :func:`busiest_rank` over layers."""
    factors = busiest_rank(plan, ep_size)
    return sum(factors) / len(factors)
