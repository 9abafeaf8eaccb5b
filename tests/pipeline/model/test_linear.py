"""An expert's linear maps against torch's. Run: pytest tests/pipeline/model/test_linear.py"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.model.moe.linear import linear, two_linear
from tests.helpers.rounding import assert_rounded_once

SIZES = [(6, 10), (10, 6)]  # the weight gradient's first factor is the smaller one, or the larger


def with_gradients(
    compute: Callable[..., tuple[Tensor, Tensor]], rows: int, sizes: tuple[int, int], dtype: torch.dtype, bias: bool
) -> list[Tensor]:
    """Both outputs, and the gradients of the input, the weight and the bias."""
    torch.manual_seed(0)
    size, out = sizes
    inputs = [torch.randn(rows, size), torch.randn(2 * out, size), *([torch.randn(2 * out)] if bias else [])]
    inputs = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    outputs = compute(*inputs)
    upstream = [torch.randn(rows, out).to(dtype) for _ in outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs, upstream)]


def torchs(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    first, second = F.linear(x, weight, bias).chunk(2, dim=-1)
    return first, second


def one_by_one(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    biases = [None, None] if bias is None else bias.chunk(2)
    first, second = (linear(x, *part) for part in zip(weight.chunk(2), biases, strict=True))
    return first, second


@pytest.mark.parametrize("compute", [two_linear, one_by_one])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_outputs_and_gradients_are_torchs(
    compute: Callable[..., tuple[Tensor, Tensor]],
    dtype: torch.dtype,
    tolerance: float,
    rows: int,
    sizes: tuple[int, int],
    bias: bool,
) -> None:
    found = with_gradients(compute, rows, sizes, dtype, bias)
    expected = with_gradients(torchs, rows, sizes, dtype, bias)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * rows)


@pytest.mark.parametrize("sizes", SIZES)
def test_a_weight_gradient_in_bf16_is_summed_in_fp32_and_rounded_once(sizes: tuple[int, int]) -> None:
    torch.manual_seed(0)
    size, out = sizes
    x, upstream = torch.randn(512, size).bfloat16(), torch.randn(512, out).bfloat16()
    weight = torch.randn(out, size).bfloat16().requires_grad_()
    (found,) = torch.autograd.grad(linear(x, weight), weight, upstream)
    factors = upstream.double().t(), x.double()
    assert_rounded_once(found, factors[0] @ factors[1], factors[0].abs() @ factors[1].abs())


def test_outputs_are_contiguous_and_so_are_gradients_of_both_halves() -> None:
    x, weight = torch.randn(5, 4), torch.randn(6, 4, requires_grad=True)
    first, second = two_linear(x, weight)
    assert first.is_contiguous() and second.is_contiguous()
    (first.sum() + second.sum()).backward()
    assert weight.grad is not None and weight.grad.is_contiguous()


def test_a_frozen_weight_and_an_input_that_needs_no_gradient_cost_no_product() -> None:
    x, weight = torch.randn(5, 4, requires_grad=True), torch.randn(6, 4)
    with torch.profiler.profile() as products:
        sum(part.sum() for part in two_linear(x, weight)).backward()
    assert _products(products) == {"aten::mm": 3, "aten::addmm_": 1}, "two of the forward, and two of the input"
    x, weight = x.detach(), weight.requires_grad_()
    with torch.profiler.profile() as products:
        sum(part.sum() for part in two_linear(x, weight)).backward()
    assert _products(products) == {"aten::mm": 4}, "two of the forward, and one for each half of the weight"
    assert x.grad is None


def _products(profile: torch.profiler.profile) -> dict[str, int]:
    return {event.key: event.count for event in profile.key_averages() if event.key in ("aten::mm", "aten::addmm_")}
