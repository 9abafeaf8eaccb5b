"""A little of a set's training text, drawn over the whole of it, whatever caps and replay leave of it."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.seeded import seeded_hash, seeded_order
from data_prep.filters import Filters
from data_prep.make_plan import Planned
from data_prep.phases.filter import holds_out
from data_prep.plan import SetPlan, reading_of
from data_prep.reading.documents import BadRows, Document, read_documents
from data_prep.reading.file_splits import FileSplit
from data_prep.tokenizer import DocumentEncoder

SLICES = 8  # that share in giving the tokens; more are read only where these have too little text


class SampledDocument(NamedTuple):
    """A document's text, and its token ids with BOS and separator, [tokens]."""

    text: str
    ids: NDArray[np.integer]


def sample_documents(
    planned: Planned, name: str, tokens: int, encoder: DocumentEncoder | None = None
) -> list[SampledDocument]:
    """Random documents of a set, those left out that the filters drop or that are held out.

    It depends on the set's text and filters, on the tokenizer and on the run's seed.

    Args:
        planned: what the run wants of its text.
        name: of an old or new set.
        tokens: how many are wanted; the last document may pass that, and there are fewer where the text has fewer.
        encoder: the tokenizer; without it the run's.
    """
    one = next(found for found in planned.sets if found.name == name and found.trains)
    slices = planned.corpora[name]
    order = seeded_order(planned.config.text_seed, len(slices), "sample")
    documents: list[SampledDocument] = []
    total = 0
    for position, number in enumerate(order):
        share = math.ceil((tokens - total) / max(1, min(SLICES, len(order)) - position))
        for document in _of_slice(planned, one, number, encoder or planned.encoder):
            if share <= 0:
                break
            documents.append(document)
            share -= document.ids.size
            total += document.ids.size
        if total >= tokens:
            break
    return documents


def _of_slice(planned: Planned, one: SetPlan, number: int, encoder: DocumentEncoder) -> Iterator[SampledDocument]:
    """The documents of a slice in a random order."""
    data, (source, splits) = planned.config.data, planned.corpora[one.name][number]
    filters = Filters(data.filters, one.entry, one.name)
    documents = list(_read(planned, one, source, splits))
    documents.sort(key=lambda document: seeded_hash(planned.config.text_seed, "sample", number, document.index))
    for document in documents:
        filtered = filters.apply(document.text)
        if filtered.reason is None:
            yield SampledDocument(filtered.text, encoder.encode([filtered.text])[0])


def _read(planned: Planned, one: SetPlan, source: int, splits: list[FileSplit]) -> Iterator[Document]:
    """The training documents of a slice, or of the beginning of one that is larger than ``data.slice_bytes``."""
    data, characters = planned.config.data, 0
    for document in read_documents(splits, reading_of(data, one, source), BadRows()):
        if characters > data.slice_bytes:
            return
        characters += len(document.text)
        if not holds_out(planned.config.text_seed, planned.fraction, one, document):
            yield document
