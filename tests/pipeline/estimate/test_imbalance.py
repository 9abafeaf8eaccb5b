"""What unequal experts cost in time. Run: pytest tests/pipeline/estimate/test_imbalance.py"""

import pytest

from pipeline.distributed.parallel_dims import ParallelDims, imbalance
from pipeline.estimate.imbalance import busiest_rank, mlp_time
from pipeline.model.expert_plan import ExpertPlan

# LayerMoE's plan of Llama-3.2-3B for Greek, Hungarian and Turkish (arXiv 2505.22582): 84 experts in 28 layers.
LLAMA = [5, 5, 5, 4, 3, 3, *[2] * 12, *[3] * 5, *[4] * 5]
MOE_LPR = [6] * 24  # 5 new experts per layer (arXiv 2408.11396)


def plan_of(counts: list[int]) -> ExpertPlan:
    return ExpertPlan.first_expansion(counts, old=["en"], new=["el"], top_k=2, classifier_layers=[])


@pytest.mark.parametrize(
    ("counts", "ep_size", "expected"),
    [(LLAMA, 1, 1.0), (LLAMA, 2, 1.054), (LLAMA, 4, 1.054), (LLAMA, 8, 1.054),
     (MOE_LPR, 2, 1.167), (MOE_LPR, 4, 1.167), (MOE_LPR, 8, 1.167)],
)  # fmt: skip
def test_the_papers_plans(counts: list[int], ep_size: int, expected: float) -> None:
    factors = busiest_rank(plan_of(counts), ParallelDims(ep_size, ep_size))
    assert max(factors) <= 1.3
    assert mlp_time(plan_of(counts), ParallelDims(ep_size, ep_size)) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("ep_size", "expected"), [(2, 1.268), (4, 1.863), (8, 3.354)])
def test_an_expert_on_one_rank_of_its_group_alone_makes_the_others_wait(ep_size: int, expected: float) -> None:
    times = [imbalance(count - 1, ep_size) for count in LLAMA]
    assert sum(times) / len(times) == pytest.approx(expected, abs=1e-3)


def rows_by_rank(plan: ExpertPlan, layer: int, ep_size: int, rows: int) -> list[int]:
    """The rows that each rank computes, counted one by one: each rank has ``rows`` for every expert of the layer."""
    placement = plan.placement(ParallelDims(ep_size, ep_size))[layer]
    holders = {number: rank for rank, held in enumerate(placement.experts) for number in held}
    counts = [0] * ep_size
    for sender in range(ep_size):
        group = sender // placement.dims.ep_size * placement.dims.ep_size
        for expert in range(plan.counts[layer]):
            counts[group + holders[expert] if expert else sender] += rows
    return counts


@pytest.mark.parametrize("ep_size", [1, 2, 4, 8])
@pytest.mark.parametrize("counts", [[2, 1, 9], LLAMA, MOE_LPR], ids=["one and eight", "Llama", "MoE-LPR"])
def test_it_is_the_busiest_ranks_rows_over_the_mean(counts: list[int], ep_size: int) -> None:
    plan = plan_of(counts)
    factors = busiest_rank(plan, ParallelDims(ep_size, ep_size))
    for layer in plan.moe_layers:
        rows = rows_by_rank(plan, layer, ep_size, rows=9)
        assert factors[layer] == pytest.approx(max(rows) * ep_size / sum(rows))
    assert all(factors[layer] == 1 for layer, count in enumerate(counts) if count == 1)
