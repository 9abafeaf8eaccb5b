"""Blocks that take the place of a decoder layer's MLP in benchmarks.train_step."""

import torch
from torch import Tensor, nn

from pipeline.model.moe.router import Router

TOP_K = 2  # the floors are two MLPs


class TwoDense(nn.Module):
    """The floor of top-2 routing: two MLPs on every token.

    Args:
        first: the frozen one.
        second: the other.
        shift_size: D for a trained shift of the output, so that the backward reaches as far as a router's would.
    """

    def __init__(self, first: nn.Module, second: nn.Module, shift_size: int = 0) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.shift_D = nn.Parameter(torch.zeros(shift_size)) if shift_size else None

    def forward(self, x: Tensor) -> Tensor:
        """Shape [..., D] to [..., D]."""
        y = self.first(x) + self.second(x)
        return y if self.shift_D is None else y + self.shift_D.to(y.dtype)


class TwoDenseAsRouted(nn.Module):
    """Two MLP rows per token, as many of them frozen as a router sends to expert 0; none are moved.

    Args:
        frozen: the frozen MLP.
        trained: the other.
        frozen_rows: how many rows the frozen one computes; at most the number of tokens.
    """

    def __init__(self, frozen: nn.Module, trained: nn.Module, frozen_rows: int) -> None:
        super().__init__()
        self.frozen, self.trained, self.frozen_rows = frozen, trained, frozen_rows

    def forward(self, x: Tensor) -> Tensor:
        """Shape [..., D] to [..., D]."""
        x_TD = x.flatten(0, -2)
        frozen_TD, others_TD = x_TD[: self.frozen_rows], x_TD[self.frozen_rows :]
        others_TD = torch.cat([self.frozen(frozen_TD), self.trained(others_TD)])
        return (self.trained(x_TD) + others_TD).view_as(x)


class LoopOverExperts(nn.Module):
    """What the papers' reference code does: a Python loop over the experts, each finding its tokens by a mask.

    For each expert, ``torch.where`` on the chosen numbers finds its rows (a GPU must be waited for each time); they
    are gathered, computed by an MLP of three separate projections, weighted, and added into the output.

    Args:
        experts: MLPs, expert 0 first.
        hidden: D.
    """

    def __init__(self, experts: list[nn.Module], hidden: int) -> None:
        super().__init__()
        self.router = Router(hidden, len(experts), TOP_K, has_classifier=False)
        self.experts = nn.ModuleList(experts)

    def forward(self, x: Tensor) -> Tensor:
        """Shape [..., D] to [..., D]."""
        x_TD = x.flatten(0, -2)
        routing = self.router(x_TD)
        y_TD = torch.zeros_like(x_TD)
        for number, expert in enumerate(self.experts):
            token_A, choice_A = torch.where(routing.ids_TK == number)
            weights_A = routing.weights_TK[token_A, choice_A].to(x.dtype)
            y_TD.index_add_(0, token_A, expert(x_TD[token_A]) * weights_A.unsqueeze(-1))
        return y_TD.view_as(x)


class FirstOutput(nn.Module):
    """A block whose output is the first of several, as a decoder layer takes one."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """Shape [..., D] to [..., D]."""
        output: Tensor = self.block(x)[0]
        return output
