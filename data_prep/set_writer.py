"""One set's documents to its shards, for training and held out, with a count of each and of what is dropped."""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_prep.held_out import NearCopies, is_held_out
from data_prep.shards import ShardWriter
from data_prep.sources import Document, Source, read_documents
from data_prep.store import Counts, Dropped, HeldOutDocument
from data_prep.tokenize import DocumentEncoder
from pipeline.errors import UserError
from pipeline.files import write_text
from pipeline.progress import progress

BATCH = 256  # documents encoded at a time: enough for the tokenizer's threads, little memory


@dataclass(frozen=True)
class SetTask:
    """One set to write. `fraction` of an old or new set is held out, by page or text; all of a watch set is."""

    name: str
    group: Literal["old", "new", "watch"]
    source: Source
    seed: int
    fraction: float

    def holds_out(self, document: Document) -> bool:
        """Whether this document is held out."""
        if self.group == "watch":
            return True
        key = document.text if document.page is None else document.page
        return is_held_out(key, self.seed, self.fraction)


def scan(task: SetTask, near_copies: NearCopies) -> int:
    """Read a set once, check every row, add what is held out to `near_copies`; returns its number of documents."""
    count = 0
    for document in read_documents(task.source):
        count += 1
        if task.holds_out(document):
            near_copies.add(document.text)
    return count


@dataclass
class _Tally:
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    characters: int = 0

    def add(self, text: str, tokens: int) -> None:
        self.documents += 1
        self.tokens += tokens
        self.bytes += len(text.encode())
        self.characters += len(text)


@dataclass
class _SetWriter:
    task: SetTask
    encoder: DocumentEncoder
    near_copies: NearCopies
    train_shard: ShardWriter | None
    held_out_shard: ShardWriter
    train: _Tally = field(default_factory=_Tally)
    held_out: _Tally = field(default_factory=_Tally)
    held_out_rows: list[HeldOutDocument] = field(default_factory=list)
    dropped: dict[str, _Tally] = field(default_factory=lambda: defaultdict(_Tally))

    def kept(self, documents: Iterable[Document]) -> Iterator[tuple[Document, bool]]:
        """(document, is it held out) of every document that goes into a shard."""
        for document in documents:
            held_out = self.task.holds_out(document)
            if not document.text.strip():
                self.dropped["empty"].add(document.text, 0)
            elif not held_out and self.near_copies.has_near_copy_of(document.text):
                self.dropped["near_copy"].add(document.text, 0)
            else:
                yield document, held_out

    def write(self, documents: Iterable[Document]) -> None:
        """Encode and write every document that is kept, in order."""
        kept = self.kept(documents)
        while batch := list(islice(kept, BATCH)):
            encoded = self.encoder.encode([document.text for document, _ in batch])
            for (document, held_out), ids in zip(batch, encoded, strict=True):
                if held_out:
                    self._write_held_out(document, ids)
                else:
                    assert self.train_shard is not None, "all of a watch set is held out"
                    self.train_shard.append(ids)
                    self.train.add(document.text, ids.size)

    def _write_held_out(self, document: Document, ids: NDArray[np.int64]) -> None:
        self.held_out_shard.append(ids)
        self.held_out.add(document.text, ids.size)
        self.held_out_rows.append(
            HeldOutDocument(
                page=document.page if document.page is not None else f"{document.file.name}:{document.row}",
                characters=len(document.text),
                bytes=len(document.text.encode()),
                tokens=ids.size - self.encoder.num_added,
            )
        )


def write_set(
    task: SetTask, encoder: DocumentEncoder, dtype: str, near_copies: NearCopies, num_documents: int, folder: Path
) -> tuple[Counts | None, Counts, dict[str, Dropped]]:
    """Write `folder/train.*` (not for a watch set), `folder/held_out.*` and `folder/held_out.jsonl`; print a summary.

    Returns the counts of the training part (None for a watch set) and of the held-out part, and what was dropped by
    reason.

    Raises:
        UserError: nothing is left to train on, or nothing is held out.
    """
    with ExitStack() as shards:
        train = None if task.group == "watch" else shards.enter_context(ShardWriter(folder / "train", dtype))
        held_out = shards.enter_context(ShardWriter(folder / "held_out", dtype))
        writer = _SetWriter(task, encoder, near_copies, train, held_out)
        with progress(num_documents, f"tokenize {task.name}", "document") as bar:
            writer.write(_counted(read_documents(task.source), bar))
        _check_not_empty(writer)
    rows = (json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in writer.held_out_rows)
    write_text(folder / "held_out.jsonl", "".join(rows))
    _print_summary(writer)
    dropped = {
        reason: Dropped(documents=tally.documents, characters=tally.characters)
        for reason, tally in sorted(writer.dropped.items())
    }
    return None if train is None else Counts(**asdict(writer.train)), Counts(**asdict(writer.held_out)), dropped


def _counted(documents: Iterable[Document], bar: Any) -> Iterator[Document]:
    for document in documents:
        yield document
        bar.update(1)


def _check_not_empty(writer: _SetWriter) -> None:
    task = writer.task
    where = f"data.{task.group}.{task.name}"
    lost = ", ".join(f"{tally.documents} {reason}" for reason, tally in sorted(writer.dropped.items()))
    lost = f" ({lost} dropped)" if lost else ""
    if not writer.held_out.documents:
        if task.group == "watch":
            raise UserError(f"{where}: no document with text in {task.source.path}{lost}; name another path")
        raise UserError(
            f"{where}: none of {writer.train.documents} documents is held out at data.held_out.fraction="
            f"{task.fraction}{lost}; raise the fraction or give more documents"
        )
    if writer.train_shard is not None and not writer.train.documents:
        raise UserError(
            f"{where}: no document is left to train on, {writer.held_out.documents} are held out at "
            f"data.held_out.fraction={task.fraction}{lost}; lower the fraction or give more documents"
        )


def _print_summary(writer: _SetWriter) -> None:
    train, held_out = writer.train, writer.held_out
    documents = train.documents + held_out.documents
    characters = train.characters + held_out.characters
    text_tokens = train.tokens + held_out.tokens - documents * writer.encoder.num_added
    near_copies = writer.dropped["near_copy"].documents if "near_copy" in writer.dropped else 0
    print(
        f"{writer.task.group.upper():5} {writer.task.name:12} {documents:>9,} documents {characters:>13,} characters "
        f"{text_tokens:>12,} tokens {characters / max(1, text_tokens):5.2f} characters/token | "
        f"held out {held_out.documents:,}, near-copies dropped {near_copies:,}",
        flush=True,
    )
