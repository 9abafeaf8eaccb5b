"""The losses: next token, load balancing, language priors routing (LPR), routing classifier, router z-loss,
KL divergence from the routers as a stage found them.

All are fp32. They are sums over tokens, except for load balancing, which is a mean. The stages divide them by counts
of the *global* batch, known before the first backward of a step. So summed over ranks and micro-steps they are the
loss of the whole batch, however unevenly old tokens are spread.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch import distributed as dist

from pipeline.distributed.own_time import OWN_TIME
from pipeline.model.moe.router import Routing, classify

BYTES_AT_ONCE = {"cpu": 4 << 20, "cuda": 256 << 20}  # of fp32 logits held at a time; on a CPU they fit its cache


def _log_probabilities(logits_TV: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Log probabilities in fp32 of a few rows at a time, the rows' logits, and those rows of other tensors.

    Each piece's log probabilities lie where the last one's did: memory used again stays mapped, and in a CPU's cache.
    """
    num_tokens, size = logits_TV.shape
    num_rows = max(1, min(num_tokens, BYTES_AT_ONCE[logits_TV.device.type] // (4 * size)))
    exact_RV, result_RV = torch.empty(2, num_rows, size, dtype=torch.float32, device=logits_TV.device)
    for logits_PV, *others_P in zip(*(tensor.split(num_rows) for tensor in (logits_TV, *others)), strict=True):
        exact_PV = exact_RV[: len(logits_PV)].copy_(logits_PV)
        yield torch.log_softmax(exact_PV, -1, out=result_RV[: len(logits_PV)]), logits_PV, *others_P


@torch.no_grad()
def token_losses(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """Cross-entropy of each token in nats, [T] fp32, without gradients: for scoring."""
    pieces = _log_probabilities(logits_TV, labels_T)
    return torch.cat([F.nll_loss(log_PV, labels_P, reduction="none") for log_PV, _, labels_P in pieces])


class _CrossEntropy(torch.autograd.Function):
    """Summed cross-entropy in fp32 that never holds all logits in fp32.

    The forward also computes the gradient, softmax - one-hot, a few rows at a time, in the logits' own memory. That
    takes one exponential per element instead of two, and the memory of the logits alone instead of five times theirs.
    """

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, labels_T: Tensor, weights_T: Tensor) -> Tensor:
        total = torch.zeros((), device=logits_TV.device)
        for log_PV, logits_PV, labels_P, weights_P in _log_probabilities(logits_TV, labels_T, weights_T):
            index_P1 = labels_P.unsqueeze(-1)
            total -= (log_PV.gather(-1, index_P1).squeeze(-1) * weights_P).sum()
            if ctx.needs_input_grad[0]:
                softmax_PV = log_PV.exp_()
                softmax_PV.scatter_add_(-1, index_P1, -torch.ones_like(index_P1, dtype=softmax_PV.dtype))
                logits_PV.copy_(softmax_PV.mul_(weights_P.unsqueeze(-1)))
        ctx.save_for_backward(logits_TV)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient_TV,) = ctx.saved_tensors
        return gradient_TV.mul_(gradients[0].to(gradient_TV.dtype)), None, None


def next_token_loss(logits_BLV: Tensor, labels_BL: Tensor, mask_BL: Tensor | None = None) -> Tensor:
    """L_NTP: cross-entropy of the next token, summed over tokens.

    Args:
        logits_BLV: the model's output. If it needs a gradient, it must not be read afterwards: its memory then holds
            the gradient.
        labels_BL: the next tokens.
        mask_BL: true for tokens that count; None counts all.
    """
    weights_BL = torch.ones_like(labels_BL) if mask_BL is None else mask_BL
    return _CrossEntropy.apply(logits_BLV.flatten(0, 1), labels_BL.flatten(), weights_BL.flatten().float())


def load_balancing_loss(
    routings: Sequence[Routing],
    *,
    mask_T: Tensor | None = None,
    scale: Literal["paper", "reference"] = "paper",
    statistics: Literal["global", "local"] = "global",
) -> Tensor:
    """L_balance = N * sum_i f_i P_i, the mean over layers (MoE-LPR, arXiv 2408.11396, section 3.2, eq. 5).

    f_i is the share of choices that expert i gets, P_i its mean router probability; uniform routing gives 1. With
    several ranks f is all-reduced and P stays local: the mean over ranks is then exactly the loss of all their tokens
    together, and so is its gradient.

    Args:
        routings: one per MoE layer.
        mask_T: true for tokens that count; None counts all.
        scale: ``reference`` is the reference implementation's, K times the paper's.
        statistics: ``local`` computes f from this rank's tokens alone, as the reference implementation does.
    """
    top_k = routings[0].ids_TK.shape[1]
    num_tokens = routings[0].scores_TE.shape[0]
    ones = routings[0].scores_TE.new_ones(num_tokens) if mask_T is None else mask_T.float()
    counts = [_choices(routing, ones) for routing in routings]
    statistic = torch.cat([*counts, ones.sum().view(1)])
    num_ranks = 1
    if statistics == "global" and dist.is_initialized() and dist.get_world_size() > 1:
        with OWN_TIME.waiting():
            dist.all_reduce(statistic)
        num_ranks = dist.get_world_size()
    tokens = statistic[-1].clamp(min=1.0)
    losses = []
    for routing, count_E in zip(routings, statistic[:-1].split([len(c) for c in counts]), strict=True):
        f_E = count_E / (top_k * tokens)
        p_E = (routing.scores_TE * ones.unsqueeze(-1)).sum(0) / (tokens / num_ranks)
        losses.append(len(f_E) * (f_E * p_E).sum())
    loss = torch.stack(losses).mean()
    return loss * top_k if scale == "reference" else loss


@torch.no_grad()
def _choices(routing: Routing, ones_T: Tensor) -> Tensor:
    """How many active choices of the counted tokens each expert gets, [E], fp32."""
    num_experts = routing.scores_TE.shape[1]
    weights = (ones_T.unsqueeze(-1) * routing.active_TK).flatten()
    return torch.zeros(num_experts, device=ones_T.device).index_add_(0, routing.ids_TK.flatten(), weights)


def lpr_loss(
    routings: Sequence[Routing],
    group_T: Tensor,
    mask_T: Tensor | None = None,
    *,
    form: Literal["paper", "reference"] = "paper",
    only_base: bool = False,
) -> Tensor:
    """L_LPR: - log of the probability of a token's own experts, summed over old groups' tokens, the mean over layers.

    A token of the dense model's languages, group 0, has expert 0: - log G_0 (MoE-LPR, arXiv 2408.11396, eq. 6). One
    of a group g of an earlier expansion has those that existed after it: - log sum_(i in A(g)) G_i. Without any token
    of an old group it is 0, and so is its gradient.

    Args:
        routings: one per MoE layer.
        group_T: the group of languages that each token is of, int64; the new ones are the last.
        mask_T: true for tokens that count; None counts all.
        form: ``reference`` feeds the probabilities to another softmax, as the reference implementation does; it
            can't reach 0.
        only_base: whether only group 0 is protected, as in LayerMoE's reference implementation.
    """
    losses = []
    for routing in routings:
        scores = routing.logits_TE if form == "paper" else routing.scores_TE
        log_TE = F.log_softmax(scores, dim=-1)
        loss = log_TE.new_zeros(())
        for group, size in enumerate(routing.old_experts[:1] if only_base else routing.old_experts):
            own_T = log_TE[:, 0] if size == 1 else log_TE[:, :size].logsumexp(-1)
            counts_T = group_T == group if mask_T is None else (group_T == group) & mask_T
            loss = loss - (own_T * counts_T).sum()
        losses.append(loss)
    return torch.stack(losses).mean()


def classifier_loss(routings: Sequence[Routing], group_T: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """L_cls: cross-entropy of the language group, summed over tokens, the mean over layers with a classifier.

    LayerMoE, arXiv 2505.22582, section 3.3. It is 0 if no layer has a classifier.

    Args:
        routings: one per MoE layer.
        group_T: the group of languages that each token is of, int64; the new ones are the last.
        mask_T: true for tokens that count; None counts all.
    """
    losses = []
    for routing in routings:
        if routing.class_logits_TC is not None:
            loss_T = F.cross_entropy(routing.class_logits_TC, group_T, reduction="none")
            losses.append(loss_T.sum() if mask_T is None else (loss_T * mask_T).sum())
    return torch.stack(losses).mean() if losses else torch.zeros((), device=group_T.device)


def router_z_loss(routings: Sequence[Routing], mask_T: Tensor) -> Tensor:
    """The squared logsumexp of the router's logits, summed over tokens, the mean over layers.

    ST-MoE, arXiv 2202.08906, eq. 5.

    Args:
        routings: one per MoE layer.
        mask_T: true for tokens that count.
    """
    losses = [(routing.logits_TE.logsumexp(-1).square() * mask_T).sum() for routing in routings]
    return torch.stack(losses).mean()


def router_kl_loss(routings: Sequence[Routing], new_T: Tensor) -> Tensor:
    """KL(G_reference || G), summed over tokens of new languages, the mean over layers; ours, of no paper.

    G_reference is the softmax of the routers' ``reference_logits_TE``. Without any such token it is 0.

    Args:
        routings: one per MoE layer, of routers that keep a reference.
        new_T: true for tokens of new languages that count.
    """
    losses = []
    for routing in routings:
        assert routing.reference_logits_TE is not None, (
            "Router.keep_reference was not called, or it is not in training"
        )
        now_TE, reference_TE = routing.logits_TE.log_softmax(-1), routing.reference_logits_TE.log_softmax(-1)
        kl_T = F.kl_div(now_TE, reference_TE, reduction="none", log_target=True).sum(-1)
        losses.append((kl_T * new_T).sum())
    return torch.stack(losses).mean()


@torch.no_grad()
def weight_on_first(routing: Routing, num_experts: int | None, mask_T: Tensor) -> Tensor:
    """The routing weight that tokens give to a layer's first experts, summed over the counted tokens.

    Args:
        routing: of the layer.
        num_experts: how many are meant; None for all of them.
        mask_T: true for tokens that count.
    """
    weights_TK = routing.weights_TK if num_experts is None else routing.weights_TK * (routing.ids_TK < num_experts)
    return (weights_TK.sum(-1) * mask_T).sum()


def routing_statistics(routing: Routing, mask_T: Tensor) -> dict[str, Any]:
    """Sums over the counted tokens of one layer, for metrics.

    Args:
        routing: of the layer.
        mask_T: true for tokens that count.

    Returns:
        ``tokens``: how many count. ``on_expert_0``: how many use expert 0. ``probability_0``: their G_0 summed.
        ``classified_old``: how many the classifier takes for an old group's. ``choices``: [E], how many active choices
        each expert gets.
    """
    mask = mask_T.float()
    on_expert_0 = ((routing.ids_TK == 0) & routing.active_TK).any(-1)
    logits = routing.class_logits_TC
    old = torch.zeros_like(mask) if logits is None else (classify(logits) < logits.shape[-1] - 1).float()
    return {
        "tokens": mask.sum(),
        "on_expert_0": (on_expert_0.float() * mask).sum(),
        "probability_0": (routing.scores_TE.detach()[:, 0] * mask).sum(),
        "classified_old": (old * mask).sum(),
        "choices": _choices(routing, mask),
    }
