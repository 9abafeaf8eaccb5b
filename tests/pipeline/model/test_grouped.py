"""Several experts in one kernel. Run: pytest tests/pipeline/model/test_grouped.py"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from pipeline.model.moe import experts as experts_module
from pipeline.model.moe.experts import LocalExperts
from pipeline.model.moe.grouped import can_group, grouped_linear, is_evenly_spaced

HIDDEN, FFN = 32, 48
COUNTS = [5, 0, 17, 2]  # one expert has no rows


def spaced(shapes: list[tuple[int, ...]], gap: int = 0) -> list[Tensor]:
    """Random bf16 parameters of these shapes, one after another in one buffer, with a gap between any two."""
    sizes = [math.prod(shape) + gap for shape in shapes]
    parts = (0.1 * torch.randn(sum(sizes))).bfloat16().split(sizes)
    views = [part[: part.numel() - gap].view(shape) for part, shape in zip(parts, shapes, strict=True)]
    return [nn.Parameter(view) for view in views]


def flattened(local: LocalExperts) -> LocalExperts:
    """The experts with random weights that lie in one buffer, as the optimizer leaves them."""
    parameters = list(local.parameters())
    for parameter, view in zip(parameters, spaced([tuple(p.shape) for p in parameters]), strict=True):
        parameter.data = view.data
    return local


def local_experts(**options: Any) -> LocalExperts:
    """Four in bf16."""
    mlp = LlamaMLP(LlamaConfig(hidden_size=HIDDEN, intermediate_size=FFN, num_attention_heads=1, **options))
    return LocalExperts(mlp.bfloat16(), 4, 4, "ep_size_1")


def with_gradients(
    function: Callable[..., Tensor], x: Tensor, weights: list[Tensor], upstream: Tensor
) -> list[Tensor]:
    """The output, and gradients to rows and weights."""
    output = function(x)
    return [output, *torch.autograd.grad(output, (x, *weights), upstream)]


@pytest.mark.parametrize("gap", [0, 64])
def test_output_and_gradients_are_those_of_one_product_after_another(gap: int) -> None:
    torch.manual_seed(0)
    weights = spaced([(FFN, HIDDEN)] * 4, gap)
    x = torch.randn(sum(COUNTS), HIDDEN).bfloat16().requires_grad_()
    upstream = torch.randn(sum(COUNTS), FFN).bfloat16()
    ends = torch.tensor(COUNTS).cumsum(0).int()

    def one_by_one(rows: Tensor) -> Tensor:
        return torch.cat([F.linear(part, w) for part, w in zip(rows.split(COUNTS), weights, strict=True)])

    found = with_gradients(lambda rows: grouped_linear(rows, COUNTS, ends, weights), x, weights, upstream)
    expected = with_gradients(one_by_one, x, weights, upstream)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    assert not found[3].any(), "an expert without rows has a gradient of zeros"
    assert len(found) == 6


def test_weights_are_evenly_spaced_only_in_one_memory_at_equal_distances() -> None:
    assert is_evenly_spaced(spaced([(4, 6)] * 3))
    assert is_evenly_spaced(spaced([(4, 6)] * 3, gap=8))
    apart = [torch.randn(4, 6) for _ in range(3)]
    assert not is_evenly_spaced(apart)
    buffer = torch.randn(400)
    uneven = [buffer[start : start + 24].view(4, 6) for start in (0, 24, 56)]
    assert not is_evenly_spaced(uneven)
    assert not is_evenly_spaced(list(torch.randn(4, 18).split(6, dim=1))), "columns of one matrix"


def test_a_cpu_computes_one_expert_after_another() -> None:
    weights = spaced([(FFN, HIDDEN)] * 4)
    assert not can_group(torch.randn(8, HIDDEN).bfloat16(), weights)


@pytest.mark.parametrize("bias", [False, True])
def test_a_layers_experts_give_the_same_both_ways(monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    torch.manual_seed(1)
    local = flattened(local_experts(mlp_bias=bias))
    x = torch.randn(sum(COUNTS), HIDDEN).bfloat16().requires_grad_()
    upstream = torch.randn(sum(COUNTS), HIDDEN).bfloat16()
    weights = list(local.parameters())
    calls = []

    def counted(*arguments: Any) -> Tensor:
        calls.append(None)
        return grouped_linear(*arguments)

    def outputs(rows: Tensor) -> Tensor:
        return torch.cat(local(rows.split(local.batch_sizes(rows, COUNTS)), COUNTS))

    expected = with_gradients(outputs, x, weights, upstream)
    assert not calls
    monkeypatch.setattr(experts_module, "can_group", lambda _rows, weights: is_evenly_spaced(weights))
    monkeypatch.setattr(experts_module, "grouped_linear", counted)
    found = with_gradients(outputs, x, weights, upstream)
    assert len(calls) == (0 if bias else 2), "an expert with biases is computed by itself"
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
