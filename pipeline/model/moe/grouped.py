"""The same linear map of several experts, each with its own weight and rows, in one kernel (``grouped_mm``)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNMENT = 16  # bytes that a row of the kernel's operands must be a multiple of


def can_group(x_AD: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether :func:`grouped_linear` takes these rows and weights, and is the faster way to compute them.

    It is on a GPU in bf16, at any number of rows that was measured (benchmarks/grouped_mm); on a CPU it is not.

    Args:
        x_AD: rows.
        weights: of one projection, one per expert.
    """
    if x_AD.device.type != "cuda" or x_AD.dtype != torch.bfloat16 or len(weights) < 2 or not len(x_AD):
        return False
    aligned = all(size * x_AD.element_size() % ALIGNMENT == 0 for size in weights[0].shape)
    return aligned and is_evenly_spaced(weights)


def is_evenly_spaced(weights: Sequence[Tensor]) -> bool:
    """Whether the weights lie one after another in the same memory, as far from each other."""
    storage, step = weights[0].untyped_storage().data_ptr(), _step(weights)
    return step >= weights[0].numel() and all(
        weight.is_contiguous()
        and weight.untyped_storage().data_ptr() == storage
        and weight.storage_offset() == weights[0].storage_offset() + index * step
        for index, weight in enumerate(weights)
    )


def grouped_linear(x_AD: Tensor, counts: Sequence[int], ends_N: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Rows sorted by expert, each times its expert's weight: [A, D] to [A, F].

    Every weight gets a gradient of its own, of zeros where its expert has no rows.

    Args:
        x_AD: the rows.
        counts: how many each expert has.
        ends_N: where each expert's rows end, int32, on the rows' device.
        weights: one per expert, [F, D]; see :func:`is_evenly_spaced`.
    """
    return _GroupedLinear.apply(x_AD, counts, ends_N, *weights)


def _step(weights: Sequence[Tensor]) -> int:
    """From one weight to the next, in elements."""
    return int(weights[1].storage_offset() - weights[0].storage_offset())


def _stacked(weights: Sequence[Tensor]) -> Tensor:
    """All of them as one tensor, [N, F, D], without a copy."""
    rows, columns = weights[0].shape
    return weights[0].detach().as_strided((len(weights), rows, columns), (_step(weights), columns, 1))


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_AD: Tensor, counts: Sequence[int], ends_N: Tensor, *weights: Tensor) -> Tensor:
        ctx.counts = counts
        ctx.save_for_backward(x_AD, ends_N, *weights)
        return F.grouped_mm(x_AD, _stacked(weights).transpose(1, 2), offs=ends_N)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_AD, ends_N, *weights = ctx.saved_tensors
        gradient_AF = gradients[0].contiguous()
        of_x = F.grouped_mm(gradient_AF, _stacked(weights), offs=ends_N) if ctx.needs_input_grad[0] else None
        of_weights: Sequence[Tensor | None] = [None] * len(weights)
        if any(ctx.needs_input_grad[3:]):
            parts = F.grouped_mm(gradient_AF.t(), x_AD, offs=ends_N).unbind(0)
            for part, count in zip(parts, ctx.counts, strict=True):
                if not count:
                    part.zero_()  # some GPUs' kernels leave what was in memory (pytorch/pytorch#172439)
            of_weights = parts
        return of_x, None, None, *of_weights
