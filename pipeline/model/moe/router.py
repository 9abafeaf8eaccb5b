"""Which experts a token takes, and with what weights."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OLD, NEW = 0, 1  # the routing classifier's classes


@dataclass(frozen=True)
class Routing:
    """What one layer decided for its tokens; the losses read it.

    Attributes:
        logits_TE: router logits, fp32.
        scores_TE: their softmax G, fp32.
        ids_TK: the experts taken; only those where ``taken_TK`` is true are computed.
        weights_TK: their weights in the output, 0 where not taken, summing to 1 a token.
        taken_TK: false for the second and later choices of a token that was classified as old.
        class_logits_TC: the routing classifier's logits (old, new), fp32; None where there is none.
    """

    logits_TE: Tensor
    scores_TE: Tensor
    ids_TK: Tensor
    weights_TK: Tensor
    taken_TK: Tensor
    class_logits_TC: Tensor | None


class Router(nn.Module):
    """A bias-free linear map to a score an expert, computed in fp32 (MoE-LPR section 3.1, eq. 1-3).

    With a classifier, a bias-free linear map to (old, new) decides first, from the same input, token by
    token (LayerMoE section 3.3): a token of an old language takes expert 0 alone, with weight 1.
    The classifier starts at zero, where both classes tie and every token is routed as without it.
    """

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, has_classifier: bool) -> None:
        super().__init__()
        assert num_experts >= top_k
        self.top_k = top_k
        # DeepSpeed's native checkpoints call a router's weight "gate.wg.weight".
        self.wg = nn.Linear(hidden_size, num_experts, bias=False)
        self.classifier = nn.Linear(hidden_size, 2, bias=False) if has_classifier else None
        if self.classifier is not None:
            nn.init.zeros_(self.classifier.weight)

    def reset(self, generator: torch.Generator) -> None:
        """Xavier-normal initialisation."""
        nn.init.xavier_normal_(self.wg.weight, generator=generator)

    def forward(self, x_TD: Tensor) -> Routing:
        """Route tokens: softmax over all experts, then the top K, then their weights made to sum to 1."""
        x_TD = x_TD.float()
        logits_TE = F.linear(x_TD, self.wg.weight.float())
        scores_TE = logits_TE.softmax(-1)
        weights_TK, ids_TK = scores_TE.topk(self.top_k, dim=-1)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        taken_TK = torch.ones_like(ids_TK, dtype=torch.bool)
        class_logits_TC = None
        if self.classifier is not None:
            class_logits_TC = F.linear(x_TD, self.classifier.weight.float())
            is_old_T1 = (class_logits_TC[:, OLD] > class_logits_TC[:, NEW]).unsqueeze(-1)
            first_TK = torch.zeros_like(taken_TK)
            first_TK[:, 0] = True
            ids_TK = ids_TK.masked_fill(is_old_T1, 0)
            weights_TK = torch.where(is_old_T1, first_TK.to(weights_TK.dtype), weights_TK)
            taken_TK = taken_TK & (first_TK | ~is_old_T1)
        return Routing(logits_TE, scores_TE, ids_TK, weights_TK, taken_TK, class_logits_TC)
