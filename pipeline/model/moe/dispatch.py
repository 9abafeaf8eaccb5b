"""Sends tokens to the ranks that hold their experts, and back: all-to-all of unequal sizes that drops no token."""

from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor


class _AllToAll(torch.autograd.Function):
    """all_to_all_single with unequal splits; the backward sends the gradients the other way.

    ``anchor`` is a scalar that requires a gradient if the backward reaches this layer, which all ranks of the group
    know alike. Without it autograd would skip the backward on a rank whose rows need no gradient (it holds no expert
    of the layer), and the other ranks would wait for it.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, anchor: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.splits = sent, received, group
        output = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(output, rows.contiguous(), received, sent, group=group)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        sent, received, group = ctx.splits
        gradient = gradients[0].contiguous()
        output = gradient.new_empty(sum(sent), *gradient.shape[1:])
        dist.all_to_all_single(output, gradient, sent, received, group=group)
        return output, torch.zeros((), device=gradient.device), None, None, None


@dataclass(frozen=True)
class Exchange:
    """How many rows go where in one layer's forward.

    Attributes:
        sent: rows to each rank of the group.
        received: rows from each rank of the group.
        slot_counts: rows for each local slot, from all ranks together.
        by_slot: the order that sorts received rows by slot; they arrive sorted by rank, then slot.
        by_rank: its inverse.
        group: the process group.
        anchor: see :class:`_AllToAll`.
    """

    sent: list[int]
    received: list[int]
    slot_counts: list[int]
    by_slot: Tensor
    by_rank: Tensor
    group: Any
    anchor: Tensor

    @classmethod
    def plan(cls, counts_RS: Tensor, group: Any, needs_gradient: bool) -> "Exchange":
        """Tell the group how many rows each of its ranks gets from here, and learn the same from the others.

        Args:
            counts_RS: rows for each slot of each rank, int64.
            group: the process group.
            needs_gradient: whether the backward reaches this layer.
        """
        received_RS = torch.empty_like(counts_RS)
        dist.all_to_all_single(received_RS, counts_RS.contiguous(), group=group)
        num_ranks, num_slots = counts_RS.shape
        both = torch.stack([counts_RS, received_RS]).tolist()  # the exchange's only wait for the device
        sent = [sum(row) for row in both[0]]
        received = [sum(row) for row in both[1]]
        slot_counts = [sum(row[slot] for row in both[1]) for slot in range(num_slots)]
        slots = torch.arange(num_slots, device=counts_RS.device).repeat(num_ranks)
        by_slot = slots.repeat_interleave(received_RS.flatten(), output_size=sum(received)).argsort(stable=True)
        by_rank = torch.empty_like(by_slot)
        by_rank[by_slot] = torch.arange(len(by_slot), device=by_slot.device)
        anchor = torch.zeros((), device=counts_RS.device, requires_grad=needs_gradient)
        return cls(sent, received, slot_counts, by_slot, by_rank, group, anchor)

    def dispatch(self, rows: Tensor) -> Tensor:
        """Send rows, sorted by rank, then slot; returns the rows for this rank, sorted by slot."""
        return _AllToAll.apply(rows, self.anchor, self.sent, self.received, self.group).index_select(0, self.by_slot)

    def combine(self, rows: Tensor) -> Tensor:
        """Send results back; returns them in the order in which the rows were dispatched."""
        return _AllToAll.apply(rows.index_select(0, self.by_rank), self.anchor, self.received, self.sent, self.group)
