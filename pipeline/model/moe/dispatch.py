"""Sends tokens to the ranks that hold their experts, and back: all-to-all of unequal sizes that drops no token."""

from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor

from pipeline.distributed.own_time import OWN_TIME
from pipeline.model.moe.recompute import exchanged


class _AllToAll(torch.autograd.Function):
    """all_to_all_single with unequal splits, begun; the backward sends the gradients the other way.

    ``anchor`` is a scalar that requires a gradient if the backward reaches this layer, which all ranks of the group
    know alike. Without it autograd would skip the backward on a rank whose rows need no gradient (it holds no expert
    of the layer), and the other ranks would wait for it.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, anchor: Tensor, sent: list[int], received: list[int], group: Any, handles: list[Any]
    ) -> Tensor:
        ctx.splits = sent, received, group

        def begin() -> Tensor:
            output = rows.new_empty(sum(received), *rows.shape[1:])
            handle = dist.all_to_all_single(output, rows.contiguous(), received, sent, group=group, async_op=True)
            handles.append(handle)
            return output

        return exchanged(begin).detach()  # what is kept must not hold the graph

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        sent, received, group = ctx.splits
        gradient = gradients[0].contiguous()
        output = gradient.new_empty(sum(sent), *gradient.shape[1:])
        with OWN_TIME.waiting():
            dist.all_to_all_single(output, gradient, sent, received, group=group)
        return output, torch.zeros((), device=gradient.device), None, None, None, None


@dataclass(frozen=True)
class Travelling:
    """Rows on their way. They may be read when :meth:`wait` has returned; without handles they have come before."""

    rows: Tensor
    handles: list[Any]

    def wait(self) -> Tensor:
        """The rows, arrived."""
        with OWN_TIME.waiting():
            for handle in self.handles:
                handle.wait()
        return self.rows


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
    def plan(
        cls, counts_E: Tensor, slots_N: Tensor, shape: tuple[int, int], group: Any, needs_gradient: bool
    ) -> tuple["Exchange", list[int]]:
        """Tell the group how many rows each of its ranks gets from here, and learn the same from the others.

        Args:
            counts_E: this rank's rows for each expert of the layer, expert 0 included, int64.
            slots_N: the place of each new expert among the slots of all ranks.
            shape: how many ranks the group has, and how many slots each.
            group: the process group.
            needs_gradient: whether the backward reaches this layer.

        Returns:
            The exchange, and ``counts_E`` as numbers.
        """
        return exchanged(lambda: cls._plan(counts_E, slots_N, shape, group, needs_gradient))

    @classmethod
    def _plan(
        cls, counts_E: Tensor, slots_N: Tensor, shape: tuple[int, int], group: Any, needs_gradient: bool
    ) -> tuple["Exchange", list[int]]:
        num_ranks, num_slots = shape
        sent_S = counts_E.new_zeros(num_ranks * num_slots).index_copy_(0, slots_N, counts_E[1:])
        received_S = torch.empty_like(sent_S)
        with OWN_TIME.waiting():
            dist.all_to_all_single(received_S, sent_S, group=group)
        numbers = torch.cat([counts_E, sent_S, received_S]).tolist()  # the layer's only wait for the device
        counts, flat = numbers[: len(counts_E)], numbers[len(counts_E) :]
        rows = [flat[start : start + num_slots] for start in range(0, len(flat), num_slots)]
        sent = [sum(row) for row in rows[:num_ranks]]
        received = [sum(row) for row in rows[num_ranks:]]
        slot_counts = [sum(row[slot] for row in rows[num_ranks:]) for slot in range(num_slots)]
        slots = torch.arange(num_slots, device=counts_E.device).repeat(num_ranks)
        by_slot = slots.repeat_interleave(received_S, output_size=sum(received)).argsort(stable=True)
        by_rank = torch.empty_like(by_slot)
        by_rank[by_slot] = torch.arange(len(by_slot), device=by_slot.device)
        anchor = torch.zeros((), device=counts_E.device, requires_grad=needs_gradient)
        return cls(sent, received, slot_counts, by_slot, by_rank, group, anchor), counts

    def send(self, rows: Tensor) -> Travelling:
        """Begin to send rows, sorted by rank, then slot."""
        return self._begin(rows, self.sent, self.received)

    def arrived(self, travelling: Travelling) -> Tensor:
        """The rows for this rank, sorted by slot, when all have come."""
        return travelling.wait().index_select(0, self.by_slot)

    def send_back(self, rows: Tensor) -> Tensor:
        """Send results back; returns them in the order in which the rows were sent."""
        return self._begin(rows.index_select(0, self.by_rank), self.received, self.sent).wait()

    def _begin(self, rows: Tensor, sent: list[int], received: list[int]) -> Travelling:
        handles: list[Any] = []
        output = _AllToAll.apply(rows, self.anchor, sent, received, self.group, handles)
        return Travelling(output, handles)
