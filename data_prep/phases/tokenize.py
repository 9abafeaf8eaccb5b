"""The phase that writes shards: what is left of a slice is encoded, training and held-out documents apart."""

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.files import save_array, write_text
from data_prep.dedup.deduplicate import dropped_of
from data_prep.dedup.held_out import SHINGLE
from data_prep.dedup.word_shingles import shingles, word_hashes
from data_prep.manifest import OWN_HELD_OUT
from data_prep.phases.copies import copy_index
from data_prep.phases.filter import Drops, filters_of, holds_out
from data_prep.phases.replay import draw, quota
from data_prep.plan import CHANGED, FILTER, HELD_OUT, TOKENIZE, Json, Slice
from data_prep.reading.documents import BadRows, Document, read_documents
from data_prep.shards import ShardWriter
from data_prep.statistics.tally import Tally
from data_prep.store import HeldOutDocument
from data_prep.tokenizer import DocumentEncoder
from data_prep.work import Work

BATCH_DOCUMENTS, BATCH_CHARACTERS = 256, 1 << 20  # encoded at a time: enough for threads, little memory


class Chosen(NamedTuple):
    """A document that goes into a shard: its text as it is written, and where."""

    document: Document
    text: str
    held_out: bool


Encoded = tuple[Chosen, NDArray[np.integer]]  # a document and its ids


@dataclass
class _Written:
    """What a slice gave: figures of both parts, and its held-out documents."""

    train: Tally = field(default_factory=Tally)
    held_out: Tally = field(default_factory=Tally)
    rows: list[HeldOutDocument] = field(default_factory=list)
    own_rows: list[HeldOutDocument] = field(default_factory=list)  # the same, by the model's own tokenizer
    sizes: list[tuple[int, int]] = field(default_factory=list)  # characters and bytes of each training document


def encoder_of(work: Work) -> DocumentEncoder:
    """The plan's tokenizer, loaded once a process."""
    return work.once("encoder", lambda: DocumentEncoder.load(work.folder, work.plan.tokenizer))


def own_encoder_of(work: Work) -> DocumentEncoder | None:
    """The model's own tokenizer, where the plan's extends it, loaded once a process."""
    spec = work.plan.own_tokenizer
    return None if spec is None else work.once("own encoder", lambda: DocumentEncoder.load(work.own_tokenizer, spec))


def tokenize_slice(work: Work, number: int) -> Json:
    """Write the shards of a slice.

    Returns:
        "train" and "held_out" (the figures of `Tally.as_json`, and the files' sha256 by suffix), and "dropped" (what
        was dropped since the filters, by reason) and "bad_rows" (of a set that was not filtered first).
    """
    plan, part = work.plan, work.plan.slices[number]
    drops, bad_rows, written = Drops(), BadRows(), _Written()
    figures: Json = {}
    own = own_encoder_of(work)
    with ExitStack() as shards:
        parts = ["held_out", *(["train"] if plan.set_of(part).trains else [])]
        parts += [OWN_HELD_OUT] * (own is not None)
        writers = {
            name: shards.enter_context(ShardWriter(work.path(TOKENIZE, number, f".{name}"), plan.dtype))
            for name in parts
        }
        for one, ids in _encoded(work, part, drops, bad_rows):
            writers["held_out" if one.held_out else "train"].append(ids)
            if own is not None and one.held_out:
                [own_ids] = own.encode([one.text], dtype_of_ids(work))
                writers[OWN_HELD_OUT].append(own_ids)
                written.own_rows.append(_held_out_row(one, own_ids.size - own.spec.num_added))
            _count(written, one, ids, plan.tokenizer.num_added, own)
    for name, writer in writers.items():
        if name == OWN_HELD_OUT:
            continue
        figures[name] = getattr(written, name).as_json() | {"sha256": writer.sha256}
    for name, rows in (("held_out", written.rows), *([] if own is None else [(OWN_HELD_OUT, written.own_rows)])):
        lines = (json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
        write_text(work.path(TOKENIZE, number, f".{name}.jsonl"), "".join(lines))
    sizes = np.array(written.sizes, np.uint64).reshape(-1, 2).T
    save_array(work.path(TOKENIZE, number, ".sizes.npy"), sizes)
    figures |= {"dropped": drops.as_json(), "bad_rows": bad_rows.as_json()}
    return figures


def dtype_of_ids(work: Work) -> np.dtype[np.integer]:
    """What the plan's shards hold."""
    return np.dtype(work.plan.dtype).newbyteorder("<")


def _encoded(work: Work, part: Slice, drops: Drops, bad_rows: BadRows) -> Iterable[Encoded]:
    """The documents of a slice that go into shards, in its order, each encoded once."""
    share, encoder = quota(work, part), encoder_of(work)
    dtype = dtype_of_ids(work)
    if share is None:
        return _encode(encoder, _chosen(work, part, drops, bad_rows), dtype)
    drawn = draw(work, part, share)
    chosen = [one for one in _chosen(work, part, drops, bad_rows) if one.held_out or one.document.index in drawn.rows]
    kept = list(_encode(encoder, (one for one in chosen if one.held_out), dtype))
    tokens = characters = 0
    train = sorted((one for one in chosen if not one.held_out), key=lambda one: drawn.places[one.document.index])
    for one, ids in _encode(encoder, train, dtype):
        if share.reached(tokens, characters):
            break
        kept.append((one, ids))
        tokens += ids.size
        characters += len(one.text)
    return sorted(kept, key=lambda encoded: encoded[0].document.index)


def _encode(encoder: DocumentEncoder, chosen: Iterable[Chosen], dtype: np.dtype[np.integer]) -> Iterator[Encoded]:
    for batch in _batches(chosen):
        yield from zip(batch, encoder.encode([one.text for one in batch], dtype), strict=True)


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


def _chosen(work: Work, part: Slice, drops: Drops, bad_rows: BadRows) -> Iterator[Chosen]:
    """The documents of a slice that are left after filters, deduplication and the search for copies."""
    plan, own = work.plan, work.plan.set_of(part)
    copies = copy_index(work) if own.trains and plan.held_out_texts else None
    kept = _kept(work, part, drops) if plan.is_filtered_first(own) else _read(work, part, drops, bad_rows)
    for document, text, held_out in kept:
        if copies is not None and not held_out:
            origins = copies.origins(shingles(word_hashes(text), SHINGLE))
            if origins:
                of_benchmarks = all(plan.held_out_texts[number].is_benchmark for number in origins)
                drops.add("benchmark" if of_benchmarks else "near_copy", document)
                continue
        yield Chosen(document, text, held_out)


def _read(work: Work, part: Slice, drops: Drops, bad_rows: BadRows) -> Iterator[Chosen]:
    """The documents of a slice of a set that was not filtered first: every one that holds text."""
    plan, one = work.plan, work.plan.set_of(part)
    for document in read_documents(part.splits, plan.reading(part), bad_rows):
        if document.text.strip():
            yield Chosen(document, document.text, holds_out(plan.seed, plan.fraction, one, document))
        else:
            drops.add("empty", document)


def _kept(work: Work, part: Slice, drops: Drops) -> Iterator[Chosen]:
    """The documents of a slice that the filters and deduplication left."""
    plan = work.plan
    rows = np.load(work.path(FILTER, part.number, ".rows.npy")).tolist()
    flags = dict(zip(rows, np.load(work.path(FILTER, part.number, ".flags.npy")).tolist(), strict=True))
    duplicates = dropped_of(work, part) if plan.set_of(part).trains and plan.finds_duplicates else {}
    filters = filters_of(work, part)
    for document in read_documents(part.splits, plan.reading(part), BadRows()):  # bad rows have been counted
        if not rows or document.index > rows[-1]:  # nothing after it is kept, such as past a watch set's cap
            break
        flag = flags.get(document.index)
        if flag is None:
            continue
        if document.index in duplicates:
            drops.add(duplicates[document.index], document)
            continue
        text = filters.normalize(document.text) if flag & CHANGED else document.text
        yield Chosen(document, text, bool(flag & HELD_OUT))


def _count(
    written: _Written, one: Chosen, ids: NDArray[np.integer], num_added: int, own: DocumentEncoder | None
) -> None:
    tally = written.held_out if one.held_out else written.train
    before = tally.bytes
    tally.add(one.text, ids.size, num_added, own)
    if one.held_out:
        written.rows.append(_held_out_row(one, ids.size - num_added))
    else:
        written.sizes.append((len(one.text), tally.bytes - before))


def _held_out_row(one: Chosen, tokens: int) -> HeldOutDocument:
    document = one.document
    page = document.page if document.page is not None else f"{Path(document.file).name}:{document.row}"
    return HeldOutDocument(page, len(one.text), len(one.text.encode()), tokens)
