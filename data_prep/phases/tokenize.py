"""The phase that writes shards: what is left of a slice is encoded, training and held-out documents apart."""

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.files import write_text
from data_prep.dedup.deduplicate import dropped_of
from data_prep.dedup.held_out import SHINGLE, CopyIndex
from data_prep.dedup.word_shingles import shingles, word_hashes
from data_prep.phases.filter import CHANGED, HELD_OUT, Drops, filters_of, holds_out, save_array
from data_prep.phases.filter import PHASE as FILTER
from data_prep.phases.replay import drawn, quota
from data_prep.plan import Json, Slice, Work, forgettable
from data_prep.reading.documents import BadRows, Document, read_documents
from data_prep.shards import ShardWriter
from data_prep.statistics.tally import Tally
from data_prep.store import HeldOutDocument
from data_prep.tokenizer import DocumentEncoder

PHASE = "tokenize"
BATCH_DOCUMENTS, BATCH_CHARACTERS = 256, 1 << 20  # encoded at a time: enough for threads, little memory


class Chosen(NamedTuple):
    """A document that goes into a shard: its text as it is written, and where."""

    document: Document
    text: str
    held_out: bool


@dataclass
class _Written:
    """What a slice gave: figures of both parts, and its held-out documents."""

    train: Tally = field(default_factory=Tally)
    held_out: Tally = field(default_factory=Tally)
    rows: list[HeldOutDocument] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)  # characters and bytes of each training document


@lru_cache(maxsize=2)
def _encoder(folder: Path) -> DocumentEncoder:
    return DocumentEncoder.load(folder, Work(folder).plan.tokenizer)


@lru_cache(maxsize=2)
def _copies(folder: Path) -> CopyIndex | None:
    plan = Work(folder).plan
    threshold = plan.data.held_out.near_copy_threshold
    return None if threshold is None else CopyIndex(folder / "copies", threshold)


forgettable(_encoder.cache_clear)
forgettable(_copies.cache_clear)


def tokenize_slice(work: Work, number: int) -> Json:
    """Write the shards of a slice; returns their figures and hashes, and what was dropped on the way."""
    plan, part = work.plan, work.plan.slices[number]
    drops, bad_rows, written = Drops(), BadRows(), _Written()
    chosen = _chosen(work, part, drops, bad_rows)
    if part.name in plan.replay and part.group == "old":
        chosen = iter(_within_quota(work, part, chosen))
    figures: Json = {}
    with ExitStack() as shards:
        parts = ["held_out", *(["train"] if part.trains else [])]
        writers = {
            name: shards.enter_context(ShardWriter(work.path(PHASE, number, f".{name}"), plan.dtype)) for name in parts
        }
        _write(work, part, chosen, writers, written)
    for name, writer in writers.items():
        figures[name] = getattr(written, name).as_json() | {"sha256": writer.sha256}
    rows = (json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in written.rows)
    write_text(work.path(PHASE, number, ".held_out.jsonl"), "".join(rows))
    sizes = np.array(written.sizes, np.uint32).reshape(-1, 2).T
    save_array(work, PHASE, number, ".sizes.npy", sizes.astype(np.uint64))
    figures["dropped"] = drops.as_json()
    figures["bad_rows"] = {"rows": bad_rows.count, "examples": bad_rows.examples}
    return figures


def _chosen(work: Work, part: Slice, drops: Drops, bad_rows: BadRows) -> Iterator[Chosen]:
    """The documents of a slice that are left after filters, deduplication and the search for copies."""
    copies = _copies(work.folder) if part.trains else None
    for document, text, held_out in _kept(work, part, drops, bad_rows):
        if copies is not None and not held_out:
            reason = copies.copied(shingles(word_hashes(text), SHINGLE))
            if reason is not None:
                drops.add(reason, document)
                continue
        yield Chosen(document, text, held_out)


def _kept(work: Work, part: Slice, drops: Drops, bad_rows: BadRows) -> Iterator[Chosen]:
    """The documents that the filters and deduplication left; without those phases, every one that holds text."""
    plan = work.plan
    documents = read_documents(part.pieces, plan.reading(part), bad_rows)
    if not plan.filters_first:
        for document in documents:
            if document.text.strip():
                yield Chosen(document, document.text, holds_out(plan, part, document))
            else:
                drops.add("empty", document)
        return
    flags = dict(
        zip(
            np.load(work.path(FILTER, part.number, ".rows.npy")).tolist(),
            np.load(work.path(FILTER, part.number, ".flags.npy")).tolist(),
            strict=True,
        )
    )
    duplicates = dropped_of(work, part) if part.trains and plan.data.filters.duplicates else {}
    filters = filters_of(work.folder, part.name, part.group)
    for document in documents:
        flag = flags.get(document.index)
        if flag is None:
            continue
        if document.index in duplicates:
            drops.add(duplicates[document.index], document)
            continue
        text = filters.normalize(document.text) if flag & CHANGED else document.text
        yield Chosen(document, text, bool(flag & HELD_OUT))


def _within_quota(work: Work, part: Slice, chosen: Iterator[Chosen]) -> list[Chosen]:
    """A slice's share of a replay budget: documents in a random order, until it is reached; in the slice's order."""
    share = quota(work, part)
    if share is None:
        return list(chosen)
    everything = drawn(work, part, chosen, share)
    encoder = _encoder(work.folder)
    kept = [one for one in everything if one.held_out]
    tokens = characters = 0
    for batch in _batches(one for one in everything if not one.held_out):
        for one, ids in zip(batch, encoder.encode([one.text for one in batch]), strict=True):
            if share.reached(tokens, characters):
                break
            kept.append(one)
            tokens += ids.size
            characters += len(one.text)
    return sorted(kept, key=lambda one: one.document.index)


def _batches(chosen: Iterable[Chosen]) -> Iterator[list[Chosen]]:
    batch: list[Chosen] = []
    characters = 0
    for one in chosen:
        batch.append(one)
        characters += len(one.text)
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _write(
    work: Work, part: Slice, chosen: Iterable[Chosen], writers: dict[str, ShardWriter], written: _Written
) -> None:
    encoder, dtype = _encoder(work.folder), np.dtype(work.plan.dtype).newbyteorder("<")
    for batch in _batches(chosen):
        encoded = encoder.encode([one.text for one in batch], dtype)
        for one, ids in zip(batch, encoded, strict=True):
            tally = written.held_out if one.held_out else written.train
            before = tally.bytes
            tally.add(one.text, ids.size, encoder.spec.num_added)
            writers["held_out" if one.held_out else "train"].append(ids)
            if one.held_out:
                written.rows.append(_held_out_row(one, ids, encoder.spec.num_added))
            else:
                written.sizes.append((len(one.text), tally.bytes - before))


def _held_out_row(one: Chosen, ids: NDArray[np.integer], num_added: int) -> HeldOutDocument:
    document = one.document
    page = document.page if document.page is not None else f"{Path(document.file).name}:{document.row}"
    return HeldOutDocument(page, len(one.text), len(one.text.encode()), ids.size - num_added)
