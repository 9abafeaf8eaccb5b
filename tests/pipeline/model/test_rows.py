"""Rows are taken from tokens and summed by token exactly. Run: pytest tests/pipeline/model/test_rows.py"""

import math

import pytest
import torch

from pipeline.model.moe import Routing
from pipeline.model.moe.rows import ROWS_AT_ONCE, Rows, sorted_choices
from tests.helpers.rounding import assert_rounded_once


@pytest.mark.parametrize("tokens", [11, ROWS_AT_ONCE, 2 * ROWS_AT_ONCE + 5])
@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_rows_taken_and_summed_have_the_gradients_of_a_plain_sum(top_k: int, block: int, tokens: int) -> None:
    torch.manual_seed(2)
    hidden, num_experts = 5, 4
    scores = torch.randn(tokens, num_experts).softmax(-1)
    active = torch.rand(tokens, top_k) < 0.6
    active[:, 0] = True
    weights, ids = scores.topk(top_k)
    weights = (weights * active).requires_grad_()
    x = torch.randn(tokens, hidden, requires_grad=True)
    factors = torch.randn(num_experts, hidden, requires_grad=True)
    upstream = torch.randn(tokens, hidden)

    choices, places, counts = sorted_choices(Routing(scores, scores, ids, weights, active, None), None, block)
    computed = [int((active & (ids == expert)).sum()) for expert in range(num_experts)]
    assert counts.tolist() == [block * math.ceil(count / block) for count in computed]
    rows = Rows.of(choices, places, active, int(counts.sum()))
    output = rows.take(x) * factors.repeat_interleave(counts, dim=0)
    y = rows.sum_by_token(output, weights)
    found = torch.autograd.grad(y, (x, weights, factors), upstream)

    plain = (x.unsqueeze(1) * factors[ids] * weights.unsqueeze(-1) * active.unsqueeze(-1)).sum(1)
    expected = torch.autograd.grad(plain, (x, weights, factors), upstream)
    torch.testing.assert_close(y, plain)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_in_bf16_weighted_sums_are_rounded_once() -> None:
    torch.manual_seed(3)
    tokens, hidden = 300, 8
    scores = torch.rand(tokens, 4)
    weights, ids = scores.topk(2)
    active = torch.ones(tokens, 2, dtype=torch.bool)
    choices, places, counts = sorted_choices(Routing(scores, scores, ids, weights, active, None), None, 1)
    rows = Rows.of(choices, places, active, int(counts.sum()))
    output = torch.randn(2 * tokens, hidden).bfloat16().requires_grad_()
    upstream = torch.randn(tokens, hidden).bfloat16()
    y = rows.sum_by_token(output, weights)
    (of_output,) = torch.autograd.grad(y, output, upstream)
    terms = output.detach().double()[rows.row_TK] * weights.double().unsqueeze(-1)
    assert_rounded_once(y, terms.sum(1), terms.abs().sum(1))
    weights_A = weights.double().flatten()[rows.choice_A].unsqueeze(-1)
    assert_rounded_once(of_output, upstream.double()[rows.token_A] * weights_A)
    of_rows = torch.randn(2 * tokens, hidden).bfloat16()
    x = torch.randn(tokens, hidden).bfloat16().requires_grad_()
    (of_x,) = torch.autograd.grad(rows.take(x), x, of_rows)
    assert_rounded_once(of_x, of_rows.double()[rows.row_TK].sum(1))
