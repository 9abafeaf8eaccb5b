"""How similar languages are at each layer (LayerMoE, arXiv 2505.22582, section 3.1), in one pass over the tokens."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.progress import progress
from pipeline.config.experts import SimilarityConfig
from pipeline.model.backbone import decoder_layers, find_mlp
from pipeline.records.similarity import Similarity


class MeanUnitVectors:
    """For each layer, the sum in fp64 of its MLP inputs as unit vectors: all that the similarity needs.

    The mean of all pairwise cosines between the tokens of two languages is the dot product of their mean unit
    vectors. So Q tokens cost O(Q h) instead of O(Q^2 h), and no hidden state is kept.

    Args:
        model: the dense model without its output head.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = decoder_layers(model)
        self.sums: list[Tensor | None] = [None] * len(self.layers)
        self.tokens = 0
        self._limit = 0

    def __enter__(self) -> "MeanUnitVectors":
        self._handles = [
            getattr(layer, find_mlp(layer)).register_forward_pre_hook(self._hook(index))
            for index, layer in enumerate(self.layers)
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, index: int) -> Any:
        def add(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x_TD = inputs[0].flatten(0, -2)[: self._limit].double()
            total_D = nn.functional.normalize(x_TD, dim=-1).sum(0)
            previous = self.sums[index]
            self.sums[index] = total_D if previous is None else previous + total_D

        return add

    def add(self, model: nn.Module, ids_BL: Tensor, limit: int) -> int:
        """Run the model and add its first ``limit`` tokens; returns how many there were."""
        self._limit = min(limit, ids_BL.numel())
        model(input_ids=ids_BL, use_cache=False)
        self.tokens += self._limit
        return self._limit

    def means(self) -> np.ndarray:
        """The mean unit vector of each layer's MLP inputs, [layers, D] fp64."""
        assert self.tokens
        return torch.stack([s for s in self.sums if s is not None]).cpu().numpy() / self.tokens


@torch.inference_mode()
def mean_unit_vectors(
    model: nn.Module, batches: Iterable[np.ndarray], tokens: int, description: str
) -> MeanUnitVectors:
    """Run token ids through the model until ``tokens`` of them are added.

    Args:
        model: the dense model without its output head.
        batches: token ids, [B, L] each.
        tokens: how many to add.
        description: of the progress bar.
    """
    device = next(model.parameters()).device
    with MeanUnitVectors(model) as vectors, progress(tokens, description, "token") as bar:
        for batch in batches:
            ids_BL = torch.from_numpy(batch.astype(np.int64)).to(device)
            bar.update(vectors.add(model, ids_BL, tokens - vectors.tokens))
            if vectors.tokens >= tokens:
                break
    return vectors


def packed_windows(documents: list[np.ndarray], length: int, batch_size: int = 4) -> Iterator[np.ndarray]:
    """Documents one after the other, in windows of ``length`` tokens, [B, L]; the rest is a batch of its own.

    Args:
        documents: token ids, [tokens] each.
        length: tokens per window.
        batch_size: windows per batch.
    """
    ids = np.concatenate(documents)
    whole = len(ids) // length * length
    windows = ids[:whole].reshape(-1, length)
    for first in range(0, len(windows), batch_size):
        yield windows[first : first + batch_size]
    if whole < len(ids):
        yield ids[None, whole:]


def document_windows(documents: list[np.ndarray], length: int) -> Iterator[np.ndarray]:
    """Each document by itself, in windows of at most ``length`` tokens, [1, L]."""
    for ids in documents:
        for start in range(0, len(ids), length):
            yield ids[None, start : start + length]


WINDOWS = {"packed": packed_windows, "documents": document_windows}


def similarity_of_sets(
    model: nn.Module,
    documents: Mapping[str, list[np.ndarray]],
    old: dict[str, str],
    new: dict[str, str],
    settings: SimilarityConfig,
) -> Similarity:
    """Measure a dense model on each set; sets of one language count together, by their tokens.

    Args:
        model: the dense model.
        documents: by set, token ids of documents that are drawn over the whole of its text.
        old: by set, the language of those that the model knows.
        new: by set, the language of those to teach it.
        settings: how many tokens are read of each set, and in which windows.
    """
    sums: dict[str, np.ndarray] = {}
    tokens: dict[str, int] = {}
    for name, language in {**old, **new}.items():
        windows = WINDOWS[settings.windows](documents[name], settings.sequence_length)
        vectors = mean_unit_vectors(model.base_model, windows, settings.tokens, f"similarity {name}")  # type: ignore[arg-type]
        sums[language] = sums.get(language, 0) + vectors.means() * vectors.tokens
        tokens[language] = tokens.get(language, 0) + vectors.tokens
    means = {language: total / tokens[language] for language, total in sums.items()}
    return similarity_of(means, tokens, list(dict.fromkeys(old.values())), list(dict.fromkeys(new.values())))


def similarity_of(means: dict[str, np.ndarray], tokens: dict[str, int], old: list[str], new: list[str]) -> Similarity:
    """All pairs' similarities, and S_l = (mean over new-new pairs + mean over new-old pairs) / 2.

    With one new language there are no new-new pairs, a case that the paper does not have: pairs of its own tokens are
    used instead.

    Args:
        means: each language's mean unit vectors, [layers, D].
        tokens: how many tokens of each language were read.
        old: languages that the model knows.
        new: languages that are added.
    """
    assert old and new
    languages = [*old, *new]
    keys = [*combinations(languages, 2), *((language, language) for language in languages)]
    pairs = {f"{a}&{b}": (means[a] * means[b]).sum(-1).tolist() for a, b in keys}
    by_layer = layer_similarity(pairs, *names_of_pairs(old, new))
    return Similarity(old=old, new=new, tokens=tokens, pairs=pairs, by_layer=by_layer)


def names_of_pairs(old: list[str], new: list[str]) -> tuple[list[str], list[str]]:
    """Names of the pairs of new languages, and of an old and a new one; see :func:`similarity_of`."""
    return (
        [f"{a}&{b}" for a, b in combinations(new, 2)] or [f"{new[0]}&{new[0]}"],
        [f"{a}&{b}" for a in old for b in new],
    )


def layer_similarity(pairs: dict[str, list[float]], new_new: list[str], old_new: list[str]) -> list[float]:
    """S_l = (mean over new-new pairs + mean over old-new pairs) / 2 (section 3.2).

    Args:
        pairs: each pair's similarities, by layer.
        new_new: names of the pairs of new languages.
        old_new: names of the pairs of an old and a new language.
    """
    within = np.mean([pairs[key] for key in new_new], axis=0)
    across = np.mean([pairs[key] for key in old_new], axis=0)
    return ((within + across) / 2).tolist()
