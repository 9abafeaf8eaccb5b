"""Bits per character of held-out documents; all ranks share the work."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from common.progress import progress
from data_prep.store import HeldOutDocument, TokenStore
from pipeline.distributed.process_group import Ranks
from pipeline.method.losses import routing_statistics, token_losses, weight_on_first
from pipeline.model.backbone import moe_layers, padding_matters
from pipeline.model.moe import Routing, collect_routings
from pipeline.model.new_rows import first_new_row
from pipeline.records.evaluation import SetScore

TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 16384}
LENGTH_MULTIPLE = 64  # lengths are padded to a multiple: kernels are made once per length
STATISTICS = ("tokens", "on_expert_0", "probability_0", "classified_old")  # of routing_statistics


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of one document; the last ones are scored, each given those before it in the window.

    Attributes:
        name: of the set.
        document: its number in the set.
        ids: the tokens, of which the last is only scored.
        scored: how many of the last ones are scored.
    """

    name: str
    document: int
    ids: np.ndarray
    scored: int

    @property
    def end(self) -> int:
        """How many inputs there are; the last one's next token is scored."""
        return len(self.ids) - 1

    @property
    def start(self) -> int:
        """The first input whose next token is scored."""
        return self.end - self.scored


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
            windows.append(Window(name, document, ids[max(0, end - window - 1) : end], end - 1 - start))
        tokens += documents[document].tokens  # so that both tokenizers' text is of the same documents
        if max_tokens is not None and tokens >= max_tokens:
            break
    return windows


@dataclass(frozen=True)
class Batch:
    """Windows of one forward pass, the longest first, each filled up to the same length.

    Attributes:
        windows: none where a rank has no batch left.
        length: inputs of each, padding included.
    """

    windows: list[Window]
    length: int

    @property
    def tokens(self) -> int:
        """How many are computed."""
        return len(self.windows) * self.length

    @property
    def scored(self) -> int:
        """How many are scored."""
        return sum(window.scored for window in self.windows)

    def ids(self, filler: int) -> torch.Tensor:
        """Inputs, and the last one's next token, [B, L + 1]."""
        rows = torch.full((len(self.windows), self.length + 1), filler)
        for row, window in zip(rows, self.windows, strict=True):
            row[: len(window.ids)] = torch.from_numpy(window.ids)
        return rows

    def mask(self, name: str) -> torch.Tensor:
        """True for inputs of a set whose next token is scored, [B, L]."""
        mask_BL = torch.zeros(len(self.windows), self.length, dtype=torch.bool)
        for row, window in zip(mask_BL, self.windows, strict=True):
            row[window.start : window.end] = window.name == name
        return mask_BL


def make_batches(windows: list[Window], tokens_per_batch: int, *, pads: bool = True) -> list[Batch]:
    """Put windows of similar length together, the largest batches first; they do not depend on the number of ranks.

    Args:
        windows: all that are to be scored.
        tokens_per_batch: at most, unless a window is longer.
        pads: whether windows may be filled up; if not, each is a batch of its own.
    """
    together: list[list[Window]] = []
    for window in sorted(windows, key=lambda w: -w.end):
        if pads and together and (len(together[-1]) + 1) * together[-1][0].end <= tokens_per_batch:
            together[-1].append(window)
        else:
            together.append([window])
    multiple = LENGTH_MULTIPLE if pads else 1
    batches = [Batch(each, each[0].end + -each[0].end % multiple) for each in together]
    return sorted(batches, key=lambda batch: -batch.tokens)


@torch.inference_mode()
def score_sets(
    model: nn.Module,
    store: TokenStore,
    names: Iterable[str],
    ranks: Ranks,
    *,
    window: int,
    max_tokens: int | None = None,
    groups: Mapping[str, int | None] | None = None,
    by_own_tokenizer: bool = False,
    title: str = "",
) -> dict[str, SetScore]:
    """Score the held-out documents of some sets; every rank gets the whole result.

    Windows of all sets share batches, and ranks share the batches. All ranks make the same number of forward passes,
    because with expert parallelism they exchange tokens in each. A rank that has no batch left runs one token that
    counts for nothing.

    Args:
        model: dense, or with MoE layers whose experts are spread over the ranks.
        store: the tokens.
        names: of the sets.
        ranks: all of them take part.
        window: tokens per window.
        max_tokens: in each set, stop after the document that reaches this number; None scores all.
        groups: by set, the round that added its language; None, or no entry, if the model does not know it.
        by_own_tokenizer: whether text is given to the model, and predicted, by the dense model's own tokenizer, where
            the run's extends it: so the untrained mixture scores as the dense model does.
        title: of a progress bar; without one there is none.
    """
    of_sets = {
        name: document_windows(store, name, window, max_tokens, by_own_tokenizer=by_own_tokenizer) for name in names
    }
    num_ids = first_new_row(model) if by_own_tokenizer else None
    windows = [each for of_set in of_sets.values() for each in of_set]
    batches = make_batches(windows, TOKENS_PER_BATCH[ranks.device.type], pads=not padding_matters(model))
    sums = {
        name: _Sums.zero(of_set[-1].document + 1, len(moe_layers(model)), (groups or {}).get(name), ranks.device)
        for name, of_set in of_sets.items()
    }
    total = sum(each.scored for each in windows)
    with progress(total, title, "token", show=bool(title) and ranks.is_first) as bar:
        for start in range(0, len(batches), ranks.world_size):
            ranks.at(f"scoring {', '.join(of_sets)}, batch {start // ranks.world_size + 1} of {len(batches)}")
            together = batches[start : start + ranks.world_size]
            mine = together[ranks.rank] if ranks.rank < len(together) else Batch([], 1)
            _score_batch(model, mine, store.separator_id, ranks.device, sums, num_ids)
            bar.update(sum(batch.scored for batch in together))
    _add_up([part for each in sums.values() for part in (each.bits, each.routed)], ranks)
    return {name: each.score(store.held_out_documents(name)) for name, each in sums.items()}


@dataclass(frozen=True)
class _Sums:
    """What has been counted of a set.

    Attributes:
        bits: by document, fp64.
        routed: [MoE layers, statistics + 1], fp64; the last column is the routing weight on the group's own experts.
        group: the round that added the set's language; None if the model does not know it.
    """

    bits: torch.Tensor
    routed: torch.Tensor
    group: int | None

    @classmethod
    def zero(cls, num_documents: int, num_layers: int, group: int | None, device: torch.device) -> "_Sums":
        """Nothing counted yet."""
        bits = torch.zeros(num_documents, dtype=torch.float64, device=device)
        return cls(bits, torch.zeros(num_layers, len(STATISTICS) + 1, dtype=torch.float64, device=device), group)

    def add_routing(self, routings: list[Routing], mask_T: torch.Tensor) -> None:
        """Count the tokens where the mask is true, in each layer."""
        for index, routing in enumerate(routings):
            statistics = routing_statistics(routing, mask_T)
            old, group = routing.old_experts, self.group
            own = weight_on_first(routing, old[group] if group is not None and group < len(old) else None, mask_T)
            self.routed[index] += torch.stack([*(statistics[key] for key in STATISTICS), own]).double()

    def score(self, documents: list[HeldOutDocument]) -> SetScore:
        """The set's score; its first documents were scored."""
        routed, num_layers = self.routed.cpu(), len(self.routed)
        shares = (routed[:, 1:] / routed[:, :1].clamp(min=1)).T.tolist() if num_layers else [[], [], [], []]
        own = shares.pop()
        own_experts = sum(own) / num_layers if own and self.group is not None else None
        by_name = dict(zip(("expert_0_share", "probability_0", "classified_old"), shares, strict=True))
        characters = [document.characters for document in documents[: len(self.bits)]]
        return SetScore(bits=self.bits.tolist(), characters=characters, own_experts=own_experts, **by_name)


def _add_up(parts: list[torch.Tensor], ranks: Ranks) -> None:
    """Sum tensors over all ranks, in place."""
    summed = ranks.sum(torch.cat([part.flatten() for part in parts]))
    for part, total in zip(parts, summed.split([part.numel() for part in parts]), strict=True):
        part.copy_(total.view(part.shape))


def _score_batch(
    model: nn.Module, batch: Batch, filler: int, device: torch.device, sums: dict[str, _Sums], num_ids: int | None
) -> None:
    """Run one forward pass and count each window for its set, its bits among the first ``num_ids`` ids."""
    ids = batch.ids(filler) if batch.windows else torch.full((1, 2), filler)
    with collect_routings(model) as routings:
        logits_BLV = model(input_ids=ids[:, :-1].to(device), use_cache=False).logits
    for window, logits_LV, labels_L in zip(batch.windows, logits_BLV, ids[:, 1:].to(device), strict=False):
        scored = slice(window.start, window.end)
        nats = token_losses(logits_LV[scored, :num_ids], labels_L[scored]).double().sum()
        sums[window.name].bits[window.document] += nats / math.log(2)
    for name in dict.fromkeys(window.name for window in batch.windows):
        sums[name].add_routing(routings, batch.mask(name).flatten().to(device))
