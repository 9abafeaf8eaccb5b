"""Budgets over layers, and the plan. Run: pytest tests/pipeline/method/test_allocation.py"""

import math

import pytest

from common.errors import UserError
from pipeline.config.experts import ExpertsConfig
from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.method.allocation import (
    allocate,
    clamp_similarity,
    evenly_shared_counts,
    inverse_shares,
    largest_remainder_counts,
    most_similar_layers,
)
from pipeline.model.expert_plan import ExpertPlan

SIMILARITY = [0.1031, 0.2113, 0.4327, 0.3163, 0.1571, 0.6421]


@pytest.mark.parametrize("rounding", ["ceil", "largest_remainder"])
@pytest.mark.parametrize("num_new", [1, 5, 12, 60])
def test_a_budget_is_met_and_less_alike_layers_get_no_fewer(rounding: str, num_new: int) -> None:
    allocation = allocate(ExpertsConfig.model_validate({"num_new": num_new, "rounding": rounding}), 6, SIMILARITY)
    assert sum(allocation.counts) - 6 == num_new
    by_similarity = [count for _, count in sorted(zip(SIMILARITY, allocation.counts, strict=True))]
    assert by_similarity == sorted(by_similarity, reverse=True)
    assert min(allocation.counts) >= 1


def test_ceil_says_how_far_off_it_is_where_equal_layers_jump_together() -> None:
    allocation = allocate(ExpertsConfig(allocation="uniform", num_new=8), 6, None)
    assert allocation.counts == [2] * 6
    assert "2 below the budget" in allocation.note
    exact = allocate(ExpertsConfig(allocation="uniform", num_new=8, rounding="largest_remainder"), 6, None)
    assert exact.counts == [3, 3, 2, 2, 2, 2]


def test_explicit_counts_are_taken_as_they_are() -> None:
    counts = [2, 3, 4, 5, 6, 8]
    assert allocate(ExpertsConfig(allocation="explicit", counts=counts), 6, None).counts == counts


def test_a_similarity_that_is_not_positive_is_named_or_clamped() -> None:
    with pytest.raises(UserError, match=r"layer 1 has S = -0.2, which is not positive.*clamp"):
        inverse_shares([0.1, -0.2, 0.0])
    clamped, changed = clamp_similarity([0.1, -0.2, 0.0])
    assert changed == [1, 2]
    assert clamped[0] == 0.1
    assert all(value > 0 for value in clamped)


def test_shares_below_one_still_get_an_expert() -> None:
    assert largest_remainder_counts([0.9, 0.05, 0.05], 6) == [4, 1, 1]


def test_most_similar_layers_have_a_router() -> None:
    assert most_similar_layers(SIMILARITY, [2, 2, 2, 2, 2, 1], 2) == [2, 3]


def plan(counts: list[int], top_k: int = 2) -> ExpertPlan:
    return ExpertPlan.first_expansion(counts, old=["en"], new=["el"], top_k=top_k, classifier_layers=[])


@pytest.mark.parametrize("ep_size", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("max_imbalance", [1.0, 1.3, math.inf])
def test_placement_is_balanced_over_the_whole_model_and_loses_no_expert(ep_size: int, max_imbalance: float) -> None:
    counts = [3, 2, 1, 4, 6, 2, 2]
    dims = [ParallelDims(ep_size, ep_size, rank, max_imbalance) for rank in range(ep_size)]
    placement = plan(counts).placement(dims[0])
    assert set(placement) == {0, 1, 3, 4, 5, 6}
    for layer, found in placement.items():
        assert [number for rank in found.experts for number in rank] == list(range(1, counts[layer]))
        sizes = [len(numbers) for numbers in found.experts]
        assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
        assert [plan(counts).placement(one)[layer].local for one in dims] == found.experts * found.dims.num_replicas
    held = [sum(len(layer.local) for layer in plan(counts).placement(one).values()) for one in dims]
    assert max(held) - min(held) <= 1


def test_few_experts_are_on_every_rank() -> None:
    assert [layer.experts for layer in plan([2, 2]).placement(ParallelDims(8, 8)).values()] == [[[1]], [[1]]]


def test_keys_follow_content() -> None:
    assert plan([3, 2]).key == plan([3, 2]).key != plan([2, 3]).key
    with_classifier = ExpertPlan.first_expansion([3, 2], old=["en"], new=["el"], top_k=2, classifier_layers=[0])
    assert with_classifier.key != plan([3, 2]).key
    assert with_classifier.experts_key == plan([3, 2]).experts_key


@pytest.mark.parametrize("ep_size", [1, 2, 4, 6, 8])
def test_rounding_for_expert_parallelism_gives_the_nearest_counts_that_ranks_share_evenly(ep_size: int) -> None:
    num_new = list(range(14))
    found = [count - 1 for count in evenly_shared_counts([num + 1 for num in num_new], ep_size)]
    for before, after in zip(num_new, found, strict=True):
        assert (after == 0) == (before == 0)
        assert after == 0 or after % ep_size == 0 or ep_size % after == 0
        closer = [n for n in range(1, 30) if abs(n - before) < abs(after - before)]
        assert not [n for n in closer if n % ep_size == 0 or ep_size % n == 0] or before == 0


def test_rounding_for_expert_parallelism_says_how_far_it_is_from_the_papers() -> None:
    similarity = [0.2, 0.4, 0.5, 0.9]
    settings = ExpertsConfig(num_new=15, rounding="expert_parallel")
    paper = allocate(ExpertsConfig(num_new=15), 4, similarity).counts
    found = allocate(settings, 4, similarity, 4)
    pairs = enumerate(zip(paper, found.counts, strict=True))
    moved = [f"{layer}: {before - 1} -> {after - 1}" for layer, (before, after) in pairs if before != after]
    assert moved and found.note == (
        f"{sum(found.counts) - 4} new experts that ep_size 4 shares evenly, {sum(found.counts) - 19:+d} against the "
        f"budget; new experts by layer, other than the paper's rounding gives: {', '.join(moved)}"
    )
