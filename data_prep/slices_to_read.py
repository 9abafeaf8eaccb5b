"""How many of a source's slices are read: no more than its budgets need, in the seeded order.

What a byte of its text gives is measured on the beginning of a few slices. A source of few slices is read whole. The
number of slices grows in powers of two, so that another budget seldom changes which text is read.
"""

from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from common.files import content_key, read_json, write_json
from common.seeded import seeded_order
from data_prep.config import DataConfig, SetConfig
from data_prep.filters import Filters
from data_prep.plan import Budget, FoundSet, Json, Slices, reading_of
from data_prep.reading.documents import BadRows, read_documents
from data_prep.tokenizer import DocumentEncoder

LEAST = 8  # slices that are read in any case
PROBE_CHARACTERS = 1 << 20  # read of each of the first slices, to learn what they give
PROBE_DOCUMENTS = 50  # tokenized of each of these
MARGIN = 2.0  # read so many times what the budgets take: some of it are copies or held out
SPREAD = 8.0  # replay is drawn from so many times its size


class Yield(NamedTuple):
    """What a character of a source's text gives, after its filters: of documents, tokens and characters."""

    documents: float
    tokens: float
    characters: float


def slices_to_read(
    data: DataConfig,
    one: FoundSet,
    replay: Budget | None,
    seed: int,
    encoder: DocumentEncoder | None,
    memory: Path,
) -> Slices:
    """The slices of a set that its budgets need, in their order.

    Args:
        data: the run's settings of text.
        one: the set, with all its slices.
        replay: its part of the run's replay.
        seed: the run's.
        encoder: the tokenizer; a set that is not trained on needs none.
        memory: the folder that keeps what was measured.
    """
    if one.group == "watch" and one.entry.max_documents is not None:
        return first_slices(one.slices, seed)
    if one.group not in ("old", "new"):
        return one.slices
    chosen: Slices = []
    for source in range(len(one.entry.source_list)):
        mine = [part for part in one.slices if part[0] == source]
        limits = limits_of(one.entry, source, replay)
        if len(mine) > LEAST and limits:
            assert encoder is not None
            gives = _yield(data, one, first_slices(mine, seed), encoder, memory)
            needed = min(limit / max(getattr(gives, unit), 1e-12) for unit, limit in limits)
            mine = _enough(mine, seed, needed)
        chosen += mine
    return chosen


def limits_of(entry: SetConfig, source: int, replay: Budget | None) -> list[tuple[str, float]]:
    """Units with how much of each is to be read at most of a set's source; none where all of it is."""
    budget = Budget(*entry.source_list[source].caps).within(Budget(*entry.caps))
    limits = [(unit, limit * MARGIN) for unit, limit in budget.limits.items()]
    return limits + [(unit, limit * MARGIN * SPREAD) for unit, limit in (replay.limits if replay else {}).items()]


def first_slices(slices: Slices, seed: int) -> Slices:
    """The slices that are read in any case."""
    return _in_order(slices, _seeded(slices, seed)[:LEAST])


def _enough(slices: Slices, seed: int, characters: float) -> Slices:
    """The first slices of the seeded order that hold so many characters: a power of two of them, or all."""
    order, count = _seeded(slices, seed), LEAST
    while count < len(order) and size_of(_in_order(slices, order[:count])) < characters:
        count *= 2
    return _in_order(slices, order[:count])


def _seeded(slices: Slices, seed: int) -> list[int]:
    return seeded_order(seed, len(slices), "read")


def _in_order(slices: Slices, positions: list[int]) -> Slices:
    """Those at some positions, in the order of the text."""
    return [slices[position] for position in sorted(positions)]


def size_of(slices: Slices) -> int:
    """About how many bytes of text some slices hold."""
    return sum(split.size for _, splits in slices for split in splits)


def _yield(data: DataConfig, one: FoundSet, first: Slices, encoder: DocumentEncoder, memory: Path) -> Yield:
    """What the text of a source gives, measured once on its first slices."""
    source = first[0][0]
    named = [[(split.file, split.start, split.size) for split in splits] for _, splits in first]
    hashes = [file["sha256"] for file in one.files if file["source"] == source]
    filters = [data.filters.model_dump(mode="json"), one.entry.language_label or one.entry.language]
    key = content_key([named, hashes, filters, asdict(reading_of(data, one, source)), encoder.spec.key])
    path = memory / f"yield-{key}.json"
    if not path.is_file():
        write_json(path, _probe(data, one, first, encoder)._asdict())
    found: Json = read_json(path)
    return Yield(**found)


def _probe(data: DataConfig, one: FoundSet, slices: Slices, encoder: DocumentEncoder) -> Yield:
    filters = Filters(data.filters, one.entry, one.name)
    read = kept = documents = tokens = tokenized = 0
    for source, splits in slices:
        texts = []
        begun = read
        for document in read_documents(splits, reading_of(data, one, source), BadRows()):
            read += len(document.text)
            filtered = filters.apply(document.text)
            if filtered.reason is None:
                documents += 1
                kept += len(filtered.text)
                texts.append(filtered.text)
            if read - begun > PROBE_CHARACTERS:
                break
        for ids, text in zip(encoder.encode(texts[:PROBE_DOCUMENTS]), texts, strict=False):
            tokens += ids.size
            tokenized += len(text)
    per_character = tokens / max(1, tokenized)
    return Yield(documents / max(1, read), kept * per_character / max(1, read), kept / max(1, read))
