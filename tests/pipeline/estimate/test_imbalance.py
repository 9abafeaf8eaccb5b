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


def test_a_layer_with_one_new_expert_sends_the_whole_group_to_one_rank() -> None:
    plan = plan_of([2, 1, 9])
    assert busiest_rank(plan, 8) == [4.5, 1.0, 1.0]
    # Counted: 8 ranks with 18 rows each; of the first layer's, expert 0 keeps 9 of each rank's.
    assert (9 + 8 * 9) / 18 == 4.5
