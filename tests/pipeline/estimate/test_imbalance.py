"""What unequal experts cost in time. Run: pytest tests/pipeline/estimate/test_imbalance.py"""

import pytest

from pipeline.estimate.imbalance import busiest_rank, mlp_time
from pipeline.model.expert_plan import ExpertPlan

# LayerMoE's plan of Llama-3.2-3B for Greek, Hungarian and Turkish (arXiv 2505.22582): 84 experts in 28 layers.
LLAMA = [5, 5, 5, 4, 3, 3, *[2] * 12, *[3] * 5, *[4] * 5]
MOE_LPR = [6] * 24  # 5 new experts per layer (arXiv 2408.11396)


def plan_of(counts: list[int]) -> ExpertPlan:
    return ExpertPlan.first_expansion(counts, old=["en"], new=["el"], top_k=2, classifier_layers=[])


@pytest.mark.parametrize(
    ("counts", "ep_size", "expected"),
    [(LLAMA, 1, 1.0), (LLAMA, 2, 1.268), (LLAMA, 4, 1.863), (LLAMA, 8, 3.354),
     (MOE_LPR, 2, 1.167), (MOE_LPR, 4, 1.5), (MOE_LPR, 8, 1.5)],
)  # fmt: skip
def test_the_papers_plans(counts: list[int], ep_size: int, expected: float) -> None:
    assert mlp_time(plan_of(counts), ep_size) == pytest.approx(expected, abs=1e-3)


def rows_by_rank(plan: ExpertPlan, layer: int, ep_size: int, rows: int) -> list[int]:
    """The rows that each rank computes, counted one by one: each rank has ``rows`` for every expert of the layer."""
    holders = {number: rank for rank, held in enumerate(plan.placement(ep_size)[layer]) for number in held}
    counts = [0] * ep_size
    for sender in range(ep_size):
        for expert in range(plan.counts[layer]):
            counts[holders.get(expert, sender)] += rows  # expert 0 is on every rank
    return counts


@pytest.mark.parametrize("ep_size", [1, 2, 4, 8])
@pytest.mark.parametrize("counts", [[2, 1, 9], LLAMA, MOE_LPR], ids=["one and eight", "Llama", "MoE-LPR"])
def test_it_is_the_busiest_ranks_rows_over_the_mean(counts: list[int], ep_size: int) -> None:
    plan = plan_of(counts)
    factors = busiest_rank(plan, ep_size)
    for layer in plan.moe_layers:
        rows = rows_by_rank(plan, layer, ep_size, rows=9)
        assert factors[layer] == pytest.approx(max(rows) * ep_size / sum(rows))
    assert all(factors[layer] == 1 for layer, count in enumerate(counts) if count == 1)
