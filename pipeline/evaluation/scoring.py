"""Bits per character of held-out documents; all ranks share the work."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from data_prep.store import TokenStore
from pipeline.distributed.process_group import Ranks
from pipeline.method.losses import routing_statistics, token_losses, weight_on_first
from pipeline.model.backbone import moe_layers
from pipeline.model.moe import collect_routings
from pipeline.model.new_rows import first_new_row
from pipeline.records.evaluation import SetScore

TOKENS_PER_BATCH = {"cpu": 1024, "cuda": 16384}
LENGTH_MULTIPLE = 64  # lengths are padded to a multiple: kernels are made once per length
STATISTICS = ("tokens", "on_expert_0", "probability_0", "classified_old")  # of routing_statistics


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of one document; the last ones are scored, each given those before it in the window.

    Attributes:
        document: its number in the set.
        ids: the tokens, of which the last is only scored.
        scored: how many of the last ones are scored.
    """

    document: int
    ids: np.ndarray
    scored: int


def document_windows(
    store: TokenStore, name: str, window: int, max_tokens: int | None = None, *, by_own_tokenizer: bool = False
) -> list[Window]:
    """Whole documents in windows of at most ``window`` inputs; each token is scored in one of them.

    They follow one another, but a long document's last one begins so much earlier that it is full, as in lm-eval: its
    tokens see as many before them as others do. The first input is the document's BOS, or the document separator if
    the tokenizer has no BOS. So the document's first token is scored too. The separator at its end is not.

    Args:
        store: the tokens.
        name: of the set.
        window: tokens per window.
        max_tokens: stop after the document that reaches this number, by the run's tokenizer; None scores all.
        by_own_tokenizer: whether tokens are those of the dense model's own tokenizer, where the run's extends it.
    """
    shard, documents = store.held_out(name, by_own_tokenizer=by_own_tokenizer), store.held_out_documents(name)
    windows: list[Window] = []
    tokens = 0
    for document in range(shard.num_documents):
        ids = shard.document(document)[:-1].astype(np.int64)
        if not store.begins_with_bos:
            ids = np.concatenate([[store.separator_id], ids])
        for start in range(0, len(ids) - 1, window):
            end = min(start + window + 1, len(ids))
            windows.append(Window(document, ids[max(0, end - window - 1) : end], end - 1 - start))
        tokens += documents[document].tokens  # so that both tokenizers' text is of the same documents
        if max_tokens is not None and tokens >= max_tokens:
            break
    return windows


def make_batches(windows: list[Window], tokens_per_batch: int) -> list[list[Window]]:
    """Put windows of similar length together; the batches do not depend on the number of ranks."""
    batches: list[list[Window]] = []
    for window in sorted(windows, key=lambda w: (-len(w.ids), w.document)):
        if batches and (len(batches[-1]) + 1) * (len(batches[-1][0].ids) - 1) <= tokens_per_batch:
            batches[-1].append(window)
        else:
            batches.append([window])
    return batches


@torch.inference_mode()
def score_set(
    model: nn.Module,
    store: TokenStore,
    name: str,
    ranks: Ranks,
    *,
    window: int,
    max_tokens: int | None = None,
    group: int | None = None,
    by_own_tokenizer: bool = False,
) -> SetScore:
    """Score a set's held-out documents; every rank gets the whole result.

    All ranks make the same number of forward passes, because with expert parallelism they exchange tokens in each. A
    rank that has no batch left runs one token that counts for nothing.

    Args:
        model: dense, or with MoE layers whose experts are spread over the ranks.
        store: the tokens.
        name: of the set.
        ranks: all of them take part.
        window: tokens per window.
        max_tokens: stop after the document that reaches this number; None scores all.
        group: the round that added the set's language; None if the model does not know it.
        by_own_tokenizer: whether text is given to the model, and predicted, by the dense model's own tokenizer, where
            the run's extends it: so the untrained mixture scores as the dense model does.
    """
    windows = document_windows(store, name, window, max_tokens, by_own_tokenizer=by_own_tokenizer)
    num_ids = first_new_row(model) if by_own_tokenizer else None
    batches = make_batches(windows, TOKENS_PER_BATCH[ranks.device.type])
    num_documents = max(w.document for w in windows) + 1
    num_layers = len(moe_layers(model))
    bits = torch.zeros(num_documents, dtype=torch.float64, device=ranks.device)
    routed = torch.zeros(num_layers, len(STATISTICS) + 1, dtype=torch.float64, device=ranks.device)
    for start in range(0, len(batches), ranks.world_size):
        ranks.at(f"scoring {name}, batch {start // ranks.world_size + 1}")
        mine = batches[start + ranks.rank] if start + ranks.rank < len(batches) else []
        with collect_routings(model) as routings:
            _score_batch(model, mine, store.separator_id, ranks.device, bits, num_ids)
        mask = _scored(mine).flatten().to(ranks.device)
        for index, routing in enumerate(routings):
            sums = routing_statistics(routing, mask)
            old = routing.old_experts
            own = weight_on_first(routing, old[group] if group is not None and group < len(old) else None, mask)
            routed[index] += torch.stack([*(sums[key] for key in STATISTICS), own]).double()
    packed = ranks.sum(torch.cat([bits, routed.flatten()])).cpu()
    bits, routed = packed[:num_documents], packed[num_documents:].view(num_layers, len(STATISTICS) + 1)
    shares = (routed[:, 1:] / routed[:, :1].clamp(min=1)).T.tolist() if num_layers else [[], [], [], []]
    own = shares.pop()
    own_experts = sum(own) / num_layers if own and group is not None else None
    documents = store.held_out_documents(name)[:num_documents]
    names = ("expert_0_share", "probability_0", "classified_old")
    by_name = dict(zip(names, shares, strict=True))
    return SetScore(bits=bits.tolist(), characters=[document.characters for document in documents],
                    own_experts=own_experts, **by_name)  # fmt: skip


def _mask(batch: list[Window]) -> torch.Tensor:
    """True for inputs that are not padding, [B, L]."""
    if not batch:
        return torch.zeros(1, 1, dtype=torch.bool)
    longest = max(len(w.ids) - 1 for w in batch)
    longest += -longest % LENGTH_MULTIPLE
    return torch.arange(longest).unsqueeze(0) < torch.tensor([[len(w.ids) - 1] for w in batch])


def _scored(batch: list[Window]) -> torch.Tensor:
    """True for inputs whose next token is scored, [B, L]."""
    mask_BL = _mask(batch)
    for row, window in zip(mask_BL, batch, strict=False):
        row[: len(window.ids) - 1 - window.scored] = False
    return mask_BL


def _score_batch(
    model: nn.Module,
    batch: list[Window],
    filler: int,
    device: torch.device,
    bits: torch.Tensor,
    num_ids: int | None,
) -> None:
    """Run one forward pass and add each window's bits, among the first ``num_ids`` ids, to those of its document."""
    mask_BL = _mask(batch)
    rows = torch.full((mask_BL.shape[0], mask_BL.shape[1] + 1), filler)
    for row, window in zip(rows, batch, strict=False):
        row[: len(window.ids)] = torch.from_numpy(window.ids)
    logits_BLV = model(input_ids=rows[:, :-1].to(device), use_cache=False).logits
    for window, logits_LV, labels_L in zip(batch, logits_BLV, rows[:, 1:].to(device), strict=False):
        end = len(window.ids) - 1
        start = end - window.scored
        nats = token_losses(logits_LV[start:end, :num_ids], labels_L[start:end]).double().sum()
        bits[window.document] += nats / math.log(2)
