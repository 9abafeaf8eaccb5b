"""The new experts that this rank holds."""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.model.moe.grouped import can_group, grouped_linear, is_evenly_spaced
from pipeline.model.moe.linear import linear, two_linear


def projections(mlp: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """A gated MLP's gate, up and down projections."""
    gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    assert isinstance(gate, nn.Linear) and isinstance(up, nn.Linear) and isinstance(down, nn.Linear)
    return gate, up, down


class Expert(nn.Module):
    """A gated MLP: down(act(gate(x)) * up(x)), gate and up fused into one weight.

    Args:
        mlp: the MLP with gate_proj, up_proj, down_proj and act_fn whose shape it takes. Weights are not copied.
    """

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        gate, _, down = projections(mlp)
        options: Any = {"dtype": gate.weight.dtype, "device": gate.weight.device}
        self.gate_up_proj = nn.Parameter(torch.empty(2 * gate.out_features, gate.in_features, **options))
        self.down_proj = nn.Parameter(torch.empty(down.out_features, down.in_features, **options))
        self.gate_up_bias = None if gate.bias is None else nn.Parameter(torch.empty(2 * gate.out_features, **options))
        self.down_bias = None if down.bias is None else nn.Parameter(torch.empty(down.out_features, **options))
        self.act_fn: Callable[[Tensor], Tensor] = mlp.act_fn  # type: ignore[assignment]

    @torch.no_grad()
    def copy_mlp(self, mlp: Mapping[str, Tensor]) -> None:
        """Take the weights of a gated MLP's ``state_dict``."""
        for kind, gate_up, down in (
            ("weight", self.gate_up_proj, self.down_proj),
            ("bias", self.gate_up_bias, self.down_bias),
        ):
            if gate_up is not None:
                for part, name in zip(gate_up.chunk(2), ("gate_proj", "up_proj"), strict=True):
                    part.copy_(mlp[f"{name}.{kind}"])
            if down is not None:
                down.copy_(mlp[f"down_proj.{kind}"])

    def forward(self, x_AD: Tensor) -> Tensor:
        """Shape [A, D] to [A, D]. A may be 0; the weights then get gradients of zero."""
        gate_AF, up_AF = two_linear(x_AD, self.gate_up_proj, self.gate_up_bias)
        return linear(self.act_fn(gate_AF) * up_AF, self.down_proj, self.down_bias)


def fused_weights(mlp: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a gated MLP's ``state_dict`` under an :class:`Expert`'s parameter names."""
    weights = {
        "gate_up_proj": torch.cat([mlp["gate_proj.weight"], mlp["up_proj.weight"]]),
        "down_proj": mlp["down_proj.weight"],
    }
    if "gate_proj.bias" in mlp:
        weights["gate_up_bias"] = torch.cat([mlp["gate_proj.bias"], mlp["up_proj.bias"]])
    if "down_proj.bias" in mlp:
        weights["down_bias"] = mlp["down_proj.bias"]
    return weights


class EmptySlot(nn.Module):
    """Fills the last slot of a rank that has one expert fewer than others, as DeepSpeed numbers experts by slot."""


class LocalExperts(nn.Module):
    """This rank's experts of one layer, in slots; every rank has the same number of slots.

    On a GPU in bf16 one kernel computes them all, see :mod:`pipeline.model.moe.grouped`; else one after another.

    Args:
        mlp: see :class:`Expert`.
        num_local: experts of this rank.
        num_slots: of every rank.
        group_name: DeepSpeed's name of the experts' process groups.
    """

    def __init__(self, mlp: nn.Module, num_local: int, num_slots: int, group_name: str) -> None:
        super().__init__()
        # DeepSpeed finds experts by this name.
        self.deepspeed_experts = nn.ModuleList(
            [Expert(mlp) if slot < num_local else EmptySlot() for slot in range(num_slots)]
        )
        self.num_local = num_local
        for parameter in self.parameters():
            # How DeepSpeed knows that these are reduced over the expert-data-parallel group only.
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = group_name  # type: ignore[attr-defined]

    @property
    def experts(self) -> list[Expert]:
        """The experts, without empty slots."""
        return [expert for expert in self.deepspeed_experts if isinstance(expert, Expert)]

    def batch_sizes(self, x_AD: Tensor, counts: list[int]) -> list[int]:
        """How many rows are computed at a time: all of them, or each expert's.

        Args:
            x_AD: any rows of their device and dtype.
            counts: rows of each slot.
        """
        together = not self.num_local or self._can_group(x_AD, sum(counts))
        return [sum(counts)] if together else counts[: self.num_local]

    def forward(self, batches: Sequence[Tensor], counts: list[int]) -> list[Tensor]:
        """Compute rows that are sorted by slot, in batches of :meth:`batch_sizes`; outputs are batches too.

        An expert without rows is called too: DeepSpeed reduces gradients in hooks, which must run on all ranks.

        Args:
            batches: the rows.
            counts: rows of each slot.
        """
        experts = self.experts
        if not experts:
            return list(batches)
        if len(batches) == 1 < len(experts):
            return [self._grouped(batches[0], counts[: self.num_local])]
        return [expert(batch) for expert, batch in zip(experts, batches, strict=True)]

    def _can_group(self, x_AD: Tensor, num_rows: int) -> bool:
        experts = self.experts
        has_bias = experts[0].gate_up_bias is not None or experts[0].down_bias is not None
        return not has_bias and num_rows > 0 and all(can_group(x_AD, weights) for weights in self._weights())

    def _weights(self) -> tuple[list[Tensor], list[Tensor]]:
        """Of all experts, the fused gate and up projections, and the down projections."""
        experts = self.experts
        return [expert.gate_up_proj for expert in experts], [expert.down_proj for expert in experts]

    def _grouped(self, x_AD: Tensor, counts: list[int]) -> Tensor:
        """As :class:`Expert` computes it, all experts at once."""
        gate_up, down = self._weights()
        # From pinned memory, as a copy from elsewhere makes the program wait for the device.
        ends_N = torch.tensor(list(accumulate(counts)), dtype=torch.int32, pin_memory=x_AD.device.type == "cuda")
        ends_N = ends_N.to(x_AD.device, non_blocking=True)
        gate_AF, up_AF = grouped_linear(x_AD, counts, ends_N, gate_up).chunk(2, dim=-1)
        return grouped_linear(self.experts[0].act_fn(gate_AF) * up_AF, counts, ends_N, down)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "LocalExperts":
        """Move or convert the weights; on a GPU they then lie together, so that one kernel can take them all."""
        super()._apply(fn, recurse)
        for name in ("gate_up_proj", "down_proj"):
            weights = [getattr(expert, name) for expert in self.experts]
            if len(weights) > 1 and weights[0].device.type == "cuda" and not is_evenly_spaced(weights):
                for weight, part in zip(weights, torch.stack([w.detach() for w in weights]), strict=True):
                    weight.data = part
        return self
