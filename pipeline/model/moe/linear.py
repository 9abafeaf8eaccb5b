"""One expert's linear maps. What belongs to parts of a fused weight is computed apart, and never joined."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x_AD: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As torch's: [A, D] to [A, F] with a weight of [F, D]."""
    (output_AF,) = _Linear.apply(x_AD, weight, bias, 1)
    return output_AF


def two_linear(x_AD: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The outputs of a weight's first and second half of rows, [A, F] each, in memory of their own.

    Args:
        x_AD: the rows.
        weight: [2 F, D].
        bias: [2 F].
    """
    first_AF, second_AF = _Linear.apply(x_AD, weight, bias, 2)
    return first_AF, second_AF


def _write_weight_gradient(gradient_AF: Tensor, x_AD: Tensor, out: Tensor) -> None:
    """The product over all rows, [F, D].

    On a CPU in bf16 a product with a transposed first factor takes up to twice the time of one without: where that
    factor is the smaller one, it is worth a transposed copy.
    """
    gradient_FA = gradient_AF.t()
    if x_AD.device.type == "cpu" and x_AD.dtype == torch.bfloat16 and gradient_AF.shape[1] < x_AD.shape[1]:
        gradient_FA = gradient_FA.contiguous()
    torch.mm(gradient_FA, x_AD, out=out)


class _Linear(torch.autograd.Function):
    """A product for each of ``parts`` equal parts of a weight.

    The input's gradient is a sum of one product a part, and rounded after each, as autograd does for separate weights.
    """

    @staticmethod
    def forward(ctx: Any, x_AD: Tensor, weight: Tensor, bias: Tensor | None, parts: int) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x_AD, weight)
        biases = [None] * parts if bias is None else bias.chunk(parts)
        return tuple(F.linear(x_AD, *part) for part in zip(weight.chunk(parts), biases, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_AD, weight = ctx.saved_tensors
        weights = weight.chunk(len(gradients))
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = torch.mm(gradients[0], weights[0])
            for gradient_AF, part in zip(gradients[1:], weights[1:], strict=True):
                of_x.addmm_(gradient_AF, part)
        if ctx.needs_input_grad[1]:
            of_weight = torch.empty_like(weight)
            for gradient_AF, part in zip(gradients, of_weight.chunk(len(gradients)), strict=True):
                _write_weight_gradient(gradient_AF, x_AD, part)
        if ctx.needs_input_grad[2]:
            of_bias = torch.cat([gradient_AF.sum(0) for gradient_AF in gradients])
        return of_x, of_weight, of_bias, None
