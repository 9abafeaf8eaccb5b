"""A layer's rows: a token and one of its experts each. They are taken from tokens, and their outputs summed by token.

Both are gathers, forward and backward, with sums in fp32 that are rounded once: on a GPU no atomic additions, and for
the backward an expert's output is kept once, in its own dtype. Torch's ``embedding_bag`` gathers and adds at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.model.moe.router import Routing

BLOCK_OF_ROWS = 32
ROWS_AT_ONCE = 128


def block_of_rows(x_TD: Tensor) -> int:
    """Each expert's rows are filled up to a multiple of this: 32 in bf16 on a CPU, else 1.

    There a kernel is generated for each new number of rows, which takes longer than the product itself, and stays in
    memory. Expert batches have a different size every time. An expert's rows from several ranks are blocks of each.
    """
    return BLOCK_OF_ROWS if x_TD.dtype == torch.bfloat16 and x_TD.device.type == "cpu" else 1


@dataclass(frozen=True)
class Rows:
    """The choices that are computed, sorted by expert, then token.

    Rows that fill up a block are copies of the last token. Nobody takes their outputs, whose gradients are zero.

    Attributes:
        choice_A: the choice of each row, as token x K + k; of one that fills up a block, the number of all choices.
        token_A: its token.
        row_TK: the row of each choice; of one that is not computed, the row of the token's first choice.
        active_TK: whether a choice is computed, as 1 or 0, fp32.
    """

    choice_A: Tensor
    token_A: Tensor
    row_TK: Tensor
    active_TK: Tensor

    @classmethod
    def of(cls, choices_C: Tensor, rows_C: Tensor, active_TK: Tensor, num_rows: int) -> "Rows":
        """From :func:`sorted_choices`; ``num_rows`` is the sum of its counts."""
        row_C = torch.empty_like(choices_C)
        row_C[choices_C] = rows_C
        row_TK = row_C.view(active_TK.shape)
        row_TK = torch.where(active_TK, row_TK, row_TK[:, :1])  # a token's first choice is always computed
        num_choices, (num_tokens, top_k) = len(choices_C), active_TK.shape
        choice_A = choices_C.new_full((num_rows + num_choices,), num_choices)
        choice_A = choice_A.index_copy_(0, rows_C, choices_C)[:num_rows]  # inactive choices lie beyond
        return cls(choice_A, (choice_A // top_k).clamp_(max=num_tokens - 1), row_TK, active_TK.float())

    def take(self, x_TD: Tensor) -> Tensor:
        """Each row's token, [A, D]."""
        return _Take.apply(x_TD, self)

    def sum_by_token(self, output_AD: Tensor, weights_TK: Tensor) -> Tensor:
        """Each token's outputs, weighted and summed, [T, D]: y = sum_k w_k E_k(x)."""
        return _SumByToken.apply(output_AD, weights_TK, self)


def sorted_choices(routing: Routing, place_E: Tensor | None, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """All choices, as token x K + k, sorted by expert, then token, with inactive ones last; and where their rows are.

    Nothing here waits for the device.

    Args:
        routing: of the layer.
        place_E: the place of each expert in the order of the rows; None if it is its number.
        block: each expert's rows are filled up to a multiple of this.

    Returns:
        The choices, the row of each, and the number of each expert's rows, those that fill it up included.
    """
    num_experts = routing.scores_TE.shape[1]
    places_TK = routing.ids_TK if place_E is None else place_E[routing.ids_TK]
    expert_C = torch.where(routing.active_TK, places_TK, num_experts).flatten()
    expert_C, choices_C = expert_C.sort(stable=True)
    counts = expert_C.new_zeros(num_experts + 1).index_add_(0, expert_C, torch.ones_like(expert_C))
    rows_C = torch.arange(len(choices_C), device=choices_C.device)
    if block > 1:
        missing = -counts % block
        rows_C = rows_C + (missing.cumsum(0) - missing)[expert_C]
        counts = counts + missing
    return choices_C, rows_C, counts[:num_experts]


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of all tensors, on a CPU so few at a time that fp32 copies of them stay in its cache."""
    at_once = ROWS_AT_ONCE if tensors[0].device.type == "cpu" else max(1, len(tensors[0]))
    return zip(*(tensor.split(at_once) for tensor in tensors), strict=True)


def _weighted_sum(rows_AD: Tensor, row_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Sum over k of weight x row, each in fp32, [T, D]. The weights have the rows' dtype."""
    return F.embedding_bag(row_TK, rows_AD.detach(), mode="sum", per_sample_weights=weights_TK.detach())


def _exactly_weighted_sum(rows_AD: Tensor, row_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """As :func:`_weighted_sum`, with fp32 weights for rows of any dtype.

    ``embedding_bag`` wants weights of the rows' dtype: in bf16 each weight is given as three numbers, 8 bits each.
    """
    if rows_AD.dtype == torch.float32:
        return _weighted_sum(rows_AD, row_TK, weights_TK)
    parts, rest_TK = [], weights_TK
    for _ in range(3):
        parts.append(rest_TK.to(rows_AD.dtype))
        rest_TK = rest_TK - parts[-1].float()
    return _weighted_sum(rows_AD, row_TK.repeat(1, 3), torch.cat(parts, dim=1))


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, rows: Rows) -> Tensor:
        ctx.save_for_backward(rows.row_TK, rows.active_TK)
        return x_TD.index_select(0, rows.token_A)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        row_TK, active_TK = ctx.saved_tensors
        return _weighted_sum(gradients[0], row_TK, active_TK.to(gradients[0].dtype)), None


class _SumByToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output_AD: Tensor, weights_TK: Tensor, rows: Rows) -> Tensor:
        ctx.save_for_backward(output_AD, weights_TK, rows.choice_A, rows.token_A, rows.row_TK, rows.active_TK)
        return _exactly_weighted_sum(output_AD, rows.row_TK, weights_TK)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        output_AD, weights_TK, choice_A, token_A, row_TK, active_TK = ctx.saved_tensors
        # Rows that fill up a block have weight 0.
        weights_A = F.pad(weights_TK.flatten(), (0, 1))[choice_A]
        of_output_AD = _exactly_weighted_sum(gradients[0], token_A.unsqueeze(-1), weights_A.unsqueeze(-1))
        of_weights_A = torch.empty_like(weights_A)
        for token_P, output_PD, of_weights_P in _pieces(token_A, output_AD, of_weights_A):
            gradient_PD = gradients[0].index_select(0, token_P).float()
            torch.sum(gradient_PD.mul_(output_PD), -1, out=of_weights_P)
        return of_output_AD, of_weights_A[row_TK] * active_TK, None
