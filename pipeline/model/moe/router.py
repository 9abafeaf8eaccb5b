"""The router: it selects the experts of each token, and weights their outputs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Routing:
    """What one layer decided for its tokens; the losses read it.

    Attributes:
        logits_TE: router logits, fp32.
        scores_TE: their softmax G, fp32.
        ids_TK: each token's chosen experts; only those where ``active_TK`` is true are computed.
        weights_TK: their weights in the output, 0 where not active; each token's sum to 1.
        active_TK: false for the second and later choices of a token that was classified as old.
        class_logits_TC: the routing classifier's logits, fp32: one class per old group of languages, the last for new
            ones; None if the layer has no classifier.
        old_experts: for each old group of languages, how many of the layer's experts it may use: the first ones.
    """

    logits_TE: Tensor
    scores_TE: Tensor
    ids_TK: Tensor
    weights_TK: Tensor
    active_TK: Tensor
    class_logits_TC: Tensor | None
    old_experts: tuple[int, ...] = (1,)


def classify(class_logits_TC: Tensor) -> Tensor:
    """Each token's class, [T]: the largest logit's, the last of equal ones."""
    return class_logits_TC.shape[-1] - 1 - class_logits_TC.flip(-1).argmax(-1)


class Router(nn.Module):
    """A bias-free linear map to one score per expert, computed in fp32 (MoE-LPR, arXiv 2408.11396, eq. 1-3).

    A routing classifier, where there is one, comes first (LayerMoE, arXiv 2505.22582, sections 3.3 and 4): a bias-free
    linear map from the same input to the groups of languages. A token of an old group takes its experts from those
    that existed after the group's round: after the first expansion that is expert 0 alone, with weight 1. A token of
    the last group, the new languages, takes them from all. It starts at zero, where all classes tie, which counts as
    the last: every token is routed as if there were no classifier.

    Args:
        hidden_size: D.
        num_experts: N_l, expert 0 included.
        top_k: K.
        has_classifier: whether the layer has a routing classifier.
        old_experts: for each old group, how many experts, the first ones, existed after its round.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        has_classifier: bool,
        old_experts: tuple[int, ...] = (1,),
    ) -> None:
        super().__init__()
        assert num_experts >= top_k
        self.top_k = top_k
        # DeepSpeed's native checkpoints call a router's weight "gate.wg.weight".
        self.wg = nn.Linear(hidden_size, num_experts, bias=False)
        self.old_experts = old_experts
        self.classifier = nn.Linear(hidden_size, len(old_experts) + 1, bias=False) if has_classifier else None
        self.allowed_C: Tensor  # how many experts a token of each class may use
        self.register_buffer("allowed_C", torch.tensor([*old_experts, num_experts]), persistent=False)
        if self.classifier is not None:
            nn.init.zeros_(self.classifier.weight)

    def reset(self, generator: torch.Generator) -> None:
        """Draw the weights: Xavier-normal (MoE-LPR section 3.1)."""
        nn.init.xavier_normal_(self.wg.weight, generator=generator)

    def forward(self, x_TD: Tensor) -> Routing:
        """Route tokens: softmax over all experts, then the top K, then their weights made to sum to 1."""
        x_TD = x_TD.float()
        logits_TE = F.linear(x_TD, self.wg.weight.float())
        scores_TE = logits_TE.softmax(-1)
        selected_TE, allowed_T1, class_logits_TC = scores_TE, None, None
        if self.classifier is not None:
            class_logits_TC = F.linear(x_TD, self.classifier.weight.float())
            allowed_T1 = self.allowed_C[classify(class_logits_TC)].unsqueeze(-1)
            numbers_E = torch.arange(scores_TE.shape[1], device=x_TD.device)
            selected_TE = logits_TE.masked_fill(numbers_E >= allowed_T1, -torch.inf).softmax(-1)
        weights_TK, ids_TK = selected_TE.topk(self.top_k, dim=-1)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        active_TK = torch.ones_like(ids_TK, dtype=torch.bool) if allowed_T1 is None else ids_TK < allowed_T1
        ids_TK = ids_TK.masked_fill(~active_TK, 0)
        return Routing(logits_TE, scores_TE, ids_TK, weights_TK, active_TK, class_logits_TC, self.old_experts)


@contextmanager
def collect_routings(model: nn.Module) -> Iterator[list[Routing]]:
    """What each MoE layer decides in one forward: ``with collect_routings(model) as routings: model(...)``.

    The list fills in the order of the layers while the forward runs; nothing is kept on the layers. It takes each
    layer once, so that a second forward in the backward (activation checkpointing) adds nothing.
    """
    routers = [module for module in model.modules() if isinstance(module, Router)]
    routings: list[Routing] = []

    def hook_of(index: int) -> Any:
        def add(_router: nn.Module, _inputs: Any, routing: Routing) -> None:
            if len(routings) == index:
                routings.append(routing)

        return add

    handles = [router.register_forward_hook(hook_of(index)) for index, router in enumerate(routers)]
    try:
        yield routings
    finally:
        for handle in handles:
            handle.remove()
