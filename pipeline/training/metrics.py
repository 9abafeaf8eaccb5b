"""What a training step measured: its figures, and where they are recorded: metrics.jsonl and DeepSpeed's monitors."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.distributed.process_group import Ranks
from pipeline.model.expert_plan import ExpertPlan
from pipeline.model.moe import Routing
from pipeline.records.metrics import StepRow, ValidationRow
from pipeline.records.run_folder import METRICS_FILE, VALIDATION_FILE
from pipeline.training.monitors import rewind_tensorboard


class StepSums:
    """Sums over a step's micro-batches on this rank, then over ranks: losses by name and how tokens were routed.

    Args:
        sources: names of the stage's sources.
        plan: the experts of the model.
        device: of the sums.
    """

    ALWAYS = ("next_token", "balance", "lpr", "classifier")  # among the figures, as 0 where the stage has no such loss
    LOSSES = (*ALWAYS, "router_z", "router_kl")

    def __init__(self, sources: list[str], plan: ExpertPlan, device: torch.device) -> None:
        self.sources = sources
        self.num_experts = [plan.counts[layer] for layer in plan.moe_layers]
        self.names = set(self.ALWAYS)
        self.losses = torch.zeros(len(self.LOSSES), device=device)
        # Whole numbers, so that their sums are exact in any order; tokens that do not count go to the last place.
        self.tokens = torch.zeros(len(sources) + 1, device=device)
        self.on_expert_0 = torch.zeros(len(sources) + 1, device=device)  # summed over layers
        self.choices = [torch.zeros(count, device=device) for count in self.num_experts]

    def add_losses(self, losses: dict[str, Tensor]) -> None:
        """Add one micro-batch's losses by name, already divided by the global batch's counts."""
        self.names |= losses.keys()
        for index, name in enumerate(self.LOSSES):
            if name in losses:
                self.losses[index] += losses[name].detach()

    @torch.no_grad()
    def add_routing(self, routings: list[Routing], sources_T: Tensor) -> None:
        """Add one micro-batch's routing.

        Args:
            routings: one per MoE layer.
            sources_T: index of the source that each token is from; a token below 0 does not count.
        """
        counted_T = sources_T >= 0
        place_T = torch.where(counted_T, sources_T, len(self.sources))
        self.tokens.index_add_(0, place_T, torch.ones_like(place_T, dtype=self.tokens.dtype))
        for choices, routing in zip(self.choices, routings, strict=True):
            counted_TK = routing.active_TK & counted_T.unsqueeze(-1)
            choices.index_add_(0, routing.ids_TK.flatten(), counted_TK.flatten().to(choices.dtype))
            on_0_T = ((routing.ids_TK == 0) & routing.active_TK).any(-1)
            self.on_expert_0.index_add_(0, place_T, on_0_T.to(self.on_expert_0.dtype))

    def pack(self) -> Tensor:
        """All sums in one vector, for one all-reduce."""
        return torch.cat([self.losses, self.tokens, self.on_expert_0, *self.choices])

    def _unpack(self, packed: Tensor) -> tuple[Tensor, ...]:
        sizes = [len(self.LOSSES), len(self.tokens), len(self.on_expert_0), *self.num_experts]
        return packed.cpu().split(sizes)

    def choices_in(self, packed: Tensor) -> list[Tensor]:
        """By MoE layer, how many of the reduced vector's active choices each expert got, [E]."""
        return list(self._unpack(packed)[3:])

    def read(self, packed: Tensor) -> dict[str, Any]:
        """The figures of the reduced vector.

        Returns:
            ``loss`` (by name, not weighted), ``expert_0_share`` (by source: the share of its tokens whose output uses
            expert 0, the mean over MoE layers; empty where there are none) and ``load_imbalance`` (per MoE layer: the
            busiest expert's tokens over the mean expert's; 1 is balanced).
        """
        losses, tokens, on_expert_0, *choices = self._unpack(packed)
        of_layers = on_expert_0 / max(1, len(self.num_experts))
        named_losses = zip(self.LOSSES, losses.tolist(), strict=True)
        shares = zip(self.sources, (of_layers / tokens.clamp(min=1))[:-1], tokens[:-1], strict=True)
        return {
            "loss": {name: loss for name, loss in named_losses if name in self.names},
            "expert_0_share": {source: float(share) for source, share, count in shares if count and choices},
            "load_imbalance": [float(c.max() / c.mean().clamp(min=1e-9)) for c in choices],
        }


@dataclass
class MetricsLog:
    """Rank 0's records of a stage; each step appears once, also after a resume. On other ranks it does nothing.

    Attributes:
        folder: the stage's.
        monitor: DeepSpeed's, of the engine.
        layers: the MoE layers' numbers, for the names of curves.
        writes: whether this is rank 0.
        world_size: ranks.
    """

    folder: Path
    monitor: Any
    layers: list[int]
    writes: bool
    world_size: int

    @classmethod
    def open(cls, folder: Path, monitor: Any, layers: list[int], step: int, ranks: Ranks) -> "MetricsLog":
        """Continue after ``step`` steps: what an interrupted session recorded beyond them is dropped."""
        if ranks.is_first:
            ValidationRow.drop_rows_after(folder / VALIDATION_FILE, step)
            kept = StepRow.drop_rows_after(folder / METRICS_FILE, step)
            rewind_tensorboard(monitor, kept[-1].samples if kept else 0)
        return cls(folder, monitor, layers, ranks.is_first, ranks.world_size)

    def training_seconds(self) -> float:
        """What all steps took, without validating and saving; 0 on ranks other than 0."""
        return sum(row.seconds for row in StepRow.load_rows(self.folder / METRICS_FILE)) if self.writes else 0.0

    def step(self, row: StepRow) -> None:
        """Record one training step."""
        if not self.writes:
            return
        row.append_to(self.folder / METRICS_FILE)
        events = [(f"loss/{name}", value) for name, value in row.loss.items()]
        events += [(f"expert_0_share/{name}", value) for name, value in row.expert_0_share.items()]
        names = zip(self.layers, row.load_imbalance, strict=True)
        events += [(f"load_imbalance/layer_{layer:02d}", value) for layer, value in names]
        names_of_figures = ("lr", "grad_norm", "tokens_per_second", "tokens", "memory_gb")
        events += [(f"train/{name}", getattr(row, name)) for name in names_of_figures]
        events.append(("train/tokens_per_second_per_rank", row.tokens_per_second / self.world_size))
        events.append(("train/data_seconds", row.data_seconds))
        if row.mfu is not None:
            events.append(("train/mfu", row.mfu))
        events.append(("train/slowest_rank_percent", row.slowest_rank.percent if row.slowest_rank else 0.0))
        events.append(("train/skipped", float(row.skipped is not None)))
        self._send(events, row.samples)

    def validation(self, row: ValidationRow) -> None:
        """Record one validation."""
        if self.writes:
            row.append_to(self.folder / VALIDATION_FILE)
            self._send([(f"bits_per_character/{name}", value) for name, value in row.sets.items()], row.samples)

    def _send(self, events: list[tuple[str, float]], samples: int) -> None:
        if self.monitor.enabled:
            self.monitor.write_events([(name, value, samples) for name, value in events])
