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
        reference_logits_TE: logits of the router as :meth:`Router.keep_reference` found it, of the same input, fp32,
            without a gradient; None if it keeps none.
    """

    logits_TE: Tensor
    scores_TE: Tensor
    ids_TK: Tensor
    weights_TK: Tensor
    active_TK: Tensor
    class_logits_TC: Tensor | None
    old_experts: tuple[int, ...] = (1,)
    reference_logits_TE: Tensor | None = None


def classify(class_logits_TC: Tensor) -> Tensor:
    """Each token's class, [T]: the largest logit's, the last of equal ones."""
    return class_logits_TC.shape[-1] - 1 - class_logits_TC.flip(-1).argmax(-1)


class LinearInFp32(nn.Linear):
    """A bias-free linear map that is computed in fp32, whatever dtype its weight and input have."""

    def __init__(self, size: int, out: int) -> None:
        super().__init__(size, out, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Shape [T, D] to [T, out], fp32."""
        return F.linear(x_TD.float(), self.weight.float())


class Router(nn.Module):
    """A bias-free linear map to one score per expert, computed in fp32 (MoE-LPR, arXiv 2408.11396, eq. 1-3).

    A routing classifier, where there is one, comes first (LayerMoE, arXiv 2505.22582, sections 3.3 and 4): a bias-free
    linear map from the same input to the groups of languages. A token of an old group takes its experts from those
    that existed after the group's round: after the first expansion that is expert 0 alone, with weight 1. A token of
    the last group, the new languages, takes them from all. It starts at zero, where all classes tie, which counts as
    the last: every token is routed as if there were no classifier.

    LayerMoE's reference implementation classifies whole sequences instead, by the sum of their hidden states. That is
    here for comparison: an output then depends on later tokens and on padding, the sum grows with the length, samples
    of several documents get one class, and decoding with a cache, which sees one token at a time, classifies that.

    A selection bias, where there is one, is added to the scores to choose the top K, and to nothing else: the weights
    are those of the scores (Loss-Free Balancing, arXiv 2408.15664, eq. 3). It is a buffer in fp32 that starts at zero.

    Args:
        hidden_size: D.
        num_experts: N_l, expert 0 included.
        top_k: K.
        has_classifier: whether the layer has a routing classifier.
        old_experts: for each old group, how many experts, the first ones, existed after its round.
        has_selection_bias: whether it has a selection bias.
        classifies_sequences: whether all tokens of a sequence get one class.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        has_classifier: bool,
        old_experts: tuple[int, ...] = (1,),
        has_selection_bias: bool = False,
        classifies_sequences: bool = False,
    ) -> None:
        super().__init__()
        self.classifies_sequences = classifies_sequences
        assert num_experts >= top_k
        self.top_k = top_k
        # DeepSpeed's native checkpoints call a router's weight "gate.wg.weight".
        self.wg = LinearInFp32(hidden_size, num_experts)
        self.old_experts = old_experts
        self.classifier = LinearInFp32(hidden_size, len(old_experts) + 1) if has_classifier else None
        self.allowed_C: Tensor  # for each class, how many experts its tokens can take
        self.register_buffer("allowed_C", torch.tensor([*old_experts, num_experts]), persistent=False)
        if self.classifier is not None:
            nn.init.zeros_(self.classifier.weight)
        self.selection_bias: Tensor | None
        bias_E = torch.zeros(num_experts, dtype=torch.float32) if has_selection_bias else None
        self.register_buffer("selection_bias", bias_E)
        self.reference: Tensor | None
        self.register_buffer("reference", None, persistent=False)

    def reset(self, generator: torch.Generator) -> None:
        """Draw the weights: Xavier-normal (MoE-LPR section 3.1)."""
        nn.init.xavier_normal_(self.wg.weight, generator=generator)

    def keep_reference(self) -> None:
        """Keep a frozen copy of the weights as they are now; in training it is applied to the same input."""
        self.reference = self.wg.weight.detach().float().clone()

    @torch.no_grad()
    def _reference_logits(self, x_TD: Tensor) -> Tensor | None:
        return F.linear(x_TD, self.reference) if self.training and self.reference is not None else None

    @torch.no_grad()
    def balance(self, choices_E: Tensor, rate: float) -> None:
        """Move the selection bias of each expert by ``rate`` towards the mean load (arXiv 2408.15664, algorithm 1).

        Args:
            choices_E: how many tokens of the global batch have chosen each expert.
            rate: u of b_i = b_i + u * sign(mean load - load_i).
        """
        assert self.selection_bias is not None
        loads_E = choices_E.double()  # so that a load that is the mean differs from it by exactly 0
        self.selection_bias.add_((loads_E.mean() - loads_E).sign().to(self.selection_bias), alpha=rate)

    def _choose(self, scores_TE: Tensor, forbidden_TE: Tensor | None) -> tuple[Tensor, Tensor]:
        """The scores of the K chosen experts, and which they are; scores of forbidden ones are 0."""
        if self.selection_bias is None:
            scores_TK, ids_TK = scores_TE.topk(self.top_k, dim=-1)
            return scores_TK, ids_TK
        biased_TE = scores_TE.detach() + self.selection_bias
        if forbidden_TE is not None:
            biased_TE = biased_TE.masked_fill(forbidden_TE, -torch.inf)
        ids_TK = biased_TE.topk(self.top_k, dim=-1).indices
        return scores_TE.gather(-1, ids_TK), ids_TK

    def _class_logits(self, x_TD: Tensor, num_sequences: int) -> Tensor | None:
        """Of each token, fp32, [T, C]; None without a classifier."""
        if self.classifier is None:
            return None
        if not self.classifies_sequences:
            return self.classifier(x_TD)
        sums_BD = x_TD.view(num_sequences, -1, x_TD.shape[-1]).sum(1)
        return self.classifier(sums_BD).repeat_interleave(len(x_TD) // num_sequences, dim=0)

    def forward(self, x_TD: Tensor, num_sequences: int = 1) -> Routing:
        """Route tokens: softmax over all experts, then the top K, then their weights made to sum to 1.

        Args:
            x_TD: the tokens of one sequence after another, all of the same length.
            num_sequences: how many.
        """
        x_TD = x_TD.float()
        logits_TE = self.wg(x_TD)
        scores_TE = logits_TE.softmax(-1)
        allowed_TE, forbidden_TE, class_logits_TC = scores_TE, None, self._class_logits(x_TD, num_sequences)
        if class_logits_TC is not None:
            numbers_E = torch.arange(scores_TE.shape[1], device=x_TD.device)
            forbidden_TE = numbers_E >= self.allowed_C[classify(class_logits_TC)].unsqueeze(-1)
            allowed_TE = logits_TE.masked_fill(forbidden_TE, -torch.inf).softmax(-1)
        weights_TK, ids_TK = self._choose(allowed_TE, forbidden_TE)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        active_TK = torch.ones_like(ids_TK, dtype=torch.bool)
        if forbidden_TE is not None:
            active_TK = ~forbidden_TE.gather(-1, ids_TK)
            ids_TK = ids_TK.masked_fill(~active_TK, 0)
        reference_TE = self._reference_logits(x_TD)
        return Routing(
            logits_TE, scores_TE, ids_TK, weights_TK, active_TK, class_logits_TC, self.old_experts, reference_TE
        )


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
