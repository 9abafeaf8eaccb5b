"""Sends tokens to the ranks that hold their experts, and back: all-to-all of unequal sizes that drops no token."""

from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor

from pipeline.distributed.own_time import OWN_TIME
from pipeline.model.moe.recompute import exchanged


@dataclass
class Trip:
    """Rows' way to other ranks, and later that of their gradients back. At most one of the two is under way.

    Attributes:
        sent: rows to each rank of the group.
        received: rows from each rank of the group.
        group: the process group.
        handle: of what is under way.
        leaving: what is sent; it must not be freed meanwhile.
        coming: the rows of other ranks; they may be read after :meth:`wait`.
    """

    sent: list[int]
    received: list[int]
    group: Any
    handle: Any = None
    leaving: Tensor | None = None
    coming: Tensor | None = None

    def begin(self, rows: Tensor, *, back: bool = False) -> Tensor:
        """Begin to send rows, or gradients back; returns what may be read after :meth:`wait`."""
        sent, received = (self.received, self.sent) if back else (self.sent, self.received)
        self.leaving = rows.contiguous()
        coming = rows.new_empty(sum(received), *rows.shape[1:])
        self.handle = dist.all_to_all_single(coming, self.leaving, received, sent, group=self.group, async_op=True)
        return coming

    def wait(self) -> None:
        """Wait until all that is under way has come."""
        if self.handle is not None:
            with OWN_TIME.waiting():
                self.handle.wait()
        self.handle = self.leaving = None


class _Depart(torch.autograd.Function):
    """Rows begin their trip; the backward waits for their gradients, which :class:`_Arrive` has begun to send.

    The result only ties the two together: it has the rows' shape, and so its gradient has too.

    ``anchor`` is a scalar that requires a gradient if the backward reaches this layer, which all ranks of the group
    know alike. Without it autograd would skip the backward on a rank whose rows need no gradient (it holds no expert
    of the layer), and the other ranks would wait for it.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, anchor: Tensor, trip: Trip) -> Tensor:
        ctx.trip = trip
        trip.coming = exchanged(lambda: trip.begin(rows))
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.trip.wait()
        return gradients[0], torch.zeros((), device=gradients[0].device), None


class _Arrive(torch.autograd.Function):
    """Rows have come; the backward begins to send their gradients back.

    Until :class:`_Depart`'s backward autograd computes that of what was computed between the two forwards.
    """

    @staticmethod
    def forward(ctx: Any, departed: Tensor, trip: Trip) -> Tensor:
        ctx.trip = trip
        trip.wait()
        coming, trip.coming = trip.coming, None
        assert coming is not None
        return coming.detach()  # what a recomputation keeps must not hold the graph

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        coming = ctx.trip.begin(gradients[0], back=True)
        if torch.is_anomaly_enabled():  # autograd reads each gradient at once
            ctx.trip.wait()
        return coming, None


@dataclass(frozen=True)
class Travelling:
    """Rows on their way."""

    departed: Tensor
    trip: Trip

    def arrived(self) -> Tensor:
        """Those that come from other ranks, when all are here."""
        return _Arrive.apply(self.departed, self.trip)


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
        anchor: see :class:`_Depart`.
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
        return travelling.arrived().index_select(0, self.by_slot)

    def send_back(self, rows: Tensor) -> Tensor:
        """Send results back; returns them in the order in which the rows were sent."""
        return self._begin(rows.index_select(0, self.by_rank), self.received, self.sent).arrived()

    def _begin(self, rows: Tensor, sent: list[int], received: list[int]) -> Travelling:
        trip = Trip(sent, received, self.group)
        return Travelling(_Depart.apply(rows, self.anchor, trip), trip)
