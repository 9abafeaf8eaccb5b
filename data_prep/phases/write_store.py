"""The last phase: budgets are applied, and the shards that are left become the store, manifest last."""

import errno
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import fsync_path, sha256_file, write_json, write_text
from data_prep.phases.budgets import TOKENIZE, taken_of
from data_prep.phases.filter import PHASE as FILTER
from data_prep.plan import Json, Plan, Slice, Work
from data_prep.shards import Shard, ShardWriter, shard_paths
from data_prep.statistics.tally import Tally, fertility_warning, part_statistics
from data_prep.store import (
    MANIFEST,
    STATISTICS,
    BadRowsReport,
    Counts,
    Dropped,
    SetManifest,
    SetStatistics,
    SourceFile,
    StoreManifest,
    StoreStatistics,
    TokenStore,
    TrainShard,
)
from data_prep.tokenizer import FILES

PHASE = "finish"
EXAMPLES = 20  # places that the manifest names of each kind of loss


@dataclass
class _Set:
    """One set as it is put together. `taken` says how many of each slice's training documents it keeps."""

    name: str
    folder: Path
    taken: dict[int, int]
    slices: list[Slice]
    train: Tally = field(default_factory=Tally)
    held_out: Tally = field(default_factory=Tally)
    shards: list[TrainShard] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, Dropped] = field(default_factory=dict)
    bad_rows: BadRowsReport = field(default_factory=BadRowsReport)

    def drop(self, found: Json) -> None:
        """Add to what was dropped."""
        for reason, more in found.items():
            known = self.dropped.get(reason, Dropped())
            self.dropped[reason] = Dropped(
                documents=known.documents + more["documents"],
                characters=known.characters + more["characters"],
                examples=(known.examples + more["examples"])[:EXAMPLES],
            )


def finish(work: Work, _task: int) -> Json:
    """Make the store beside the work folder.

    Raises:
        UserError: nothing is left of a set to train on, or nothing is held out.
    """
    plan, info = work.plan, work.plan.info
    store = work.folder / "store"
    shutil.rmtree(store, ignore_errors=True)
    sets = {name: _put_together(work, name, store) for name in plan.data.sets}
    files = {name: sha256 for one in sets.values() for name, sha256 in one.files.items()}
    statistics = StoreStatistics(sets={name: _statistics(plan, one) for name, one in sets.items()})
    write_json(store / STATISTICS, statistics.model_dump(mode="json"))
    tokenizer = FILES[plan.tokenizer.kind]
    shutil.copyfile(work.folder / tokenizer, store / tokenizer)
    files |= {name: sha256_file(store / name) for name in (STATISTICS, tokenizer)}
    manifest = StoreManifest(
        key=info["key"],
        tokenizer=info["tokenizer"],
        tokenizer_key=plan.tokenizer.key,
        separator=plan.tokenizer.separator,
        separator_id=plan.tokenizer.separator_id,
        bos_id=plan.tokenizer.bos_id,
        dtype=plan.dtype,
        settings=info["settings"],
        sets={name: _manifest(plan, one) for name, one in sets.items()},
        files=dict(sorted(files.items())),
        versions=info["versions"],
    )
    write_json(store / MANIFEST, manifest.model_dump(mode="json"))
    from data_prep.statistics.page import write_page

    write_page(TokenStore(store))
    target = work.folder.parent / info["key"]
    if not (target / MANIFEST).is_file():  # or another job was first
        shutil.rmtree(target, ignore_errors=True)
        os.rename(store, target)
        fsync_path(target.parent)
    return {}


def _put_together(work: Work, name: str, store: Path) -> _Set:
    plan = work.plan
    group = plan.data.group(name)
    slices = plan.slices_of(name)
    taken = {part.number: 0 for part in slices} if group == "watch" else taken_of(work, name)
    one = _Set(name, store / name, taken, slices)
    one.folder.mkdir(parents=True)
    for place, part in enumerate(slices):
        if plan.filters_first:
            figures = work.figures(FILTER, part.number)
            one.drop(figures["dropped"])
            _add_bad_rows(one, figures)
        if part.number in taken:
            _add_slice(work, one, part, place)
    _join_held_out(work, one)
    _check_not_empty(plan, one)
    return one


def _add_bad_rows(one: _Set, figures: Json) -> None:
    found = figures["bad_rows"]
    examples = (one.bad_rows.examples + found["examples"])[:EXAMPLES]
    one.bad_rows = BadRowsReport(rows=one.bad_rows.rows + found["rows"], examples=examples)


def _add_slice(work: Work, one: _Set, part: Slice, place: int) -> None:
    figures = work.figures(TOKENIZE, part.number)
    one.drop(figures["dropped"])
    if not work.plan.filters_first:
        _add_bad_rows(one, figures)
    one.held_out.merge(figures["held_out"])
    count = one.taken[part.number]
    if not count:
        return
    prefix = one.folder / "train" / f"{place:05d}"
    prefix.parent.mkdir(exist_ok=True)
    source = work.path(TOKENIZE, part.number, ".train")
    train = figures["train"]
    if count == train["documents"]:
        for path, new in zip(shard_paths(source), shard_paths(prefix), strict=True):
            _link(path, new)
        sha256 = train["sha256"]
    else:
        train, sha256 = _shorten(work, one, part, prefix)
    one.train.merge(train)
    shard = f"{one.name}/train/{place:05d}"
    one.files |= {f"{shard}{suffix}": value for suffix, value in sha256.items()}
    one.shards.append(TrainShard(name=shard, source=part.source, documents=count, tokens=train["tokens"]))


def _shorten(work: Work, one: _Set, part: Slice, prefix: Path) -> tuple[Json, dict[str, str]]:
    """Write the first documents of a slice that a budget cuts; returns their figures and the files' hashes."""
    count, whole = one.taken[part.number], work.figures(TOKENIZE, part.number)["train"]
    shard = Shard(work.path(TOKENIZE, part.number, ".train"))
    with ShardWriter(prefix, work.plan.dtype) as writer:
        for index in range(count):
            writer.append(shard.document(index))
    characters, size = np.load(work.path(TOKENIZE, part.number, ".sizes.npy"))[:, :count].sum(axis=1)
    tally = Tally(count, int(shard.lengths[:count].sum()), int(size), int(characters))
    tally.added = count * work.plan.tokenizer.num_added
    for length in shard.lengths[:count].tolist():
        tally.lengths[length.bit_length()] += 1
    tally.sample.update(whole["sample"])  # of the slice: as good an estimate
    left = {key: whole[key] - getattr(tally, key) for key in ("documents", "characters")}
    one.drop({"over_budget": {**left, "examples": []}})
    return tally.as_json(), writer.sha256


def _link(path: Path, new: Path) -> None:
    try:
        os.link(path, new)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EXDEV, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS):
            raise
        shutil.copyfile(path, new)
        fsync_path(new)


def _join_held_out(work: Work, one: _Set) -> None:
    """One shard of all held-out documents, in the order of slices, and a line for each."""
    lines = []
    with ShardWriter(one.folder / "held_out", work.plan.dtype) as writer:
        for number in sorted(one.taken):
            shard = Shard(work.path(TOKENIZE, number, ".held_out"))
            for index in range(shard.num_documents):
                writer.append(shard.document(index))
            lines.append(work.path(TOKENIZE, number, ".held_out.jsonl").read_text(encoding="utf-8"))
    write_text(one.folder / "held_out.jsonl", "".join(lines))
    one.files |= {f"{one.name}/held_out{suffix}": value for suffix, value in writer.sha256.items()}
    one.files[f"{one.name}/held_out.jsonl"] = sha256_file(one.folder / "held_out.jsonl")


def _check_not_empty(plan: Plan, one: _Set) -> None:
    group, name = plan.data.group(one.name), one.name
    where = f"data.{group}.{name}"
    lost = ", ".join(f"{found.documents} {reason}" for reason, found in sorted(one.dropped.items()))
    lost = f" ({lost} dropped)" if lost else ""
    bad = f", {one.bad_rows.rows} bad rows skipped" if one.bad_rows.rows else ""
    if not one.held_out.documents:
        if group == "watch":
            raise UserError(f"{where}: no document with text{lost}{bad}; name another path")
        raise UserError(
            f"{where}: none of {one.train.documents} documents is held out at data.held_out.fraction="
            f"{plan.fraction:g}{lost}{bad}; raise the fraction or give more documents"
        )
    if group != "watch" and not one.train.documents:
        raise UserError(
            f"{where}: no document is left to train on, {one.held_out.documents} are held out at "
            f"data.held_out.fraction={plan.fraction:g}{lost}{bad}; lower the fraction, give more documents or larger "
            "budgets (data.replay, max_tokens)"
        )


def _counts(tally: Tally) -> Counts:
    return Counts(documents=tally.documents, tokens=tally.tokens, bytes=tally.bytes, characters=tally.characters)


def _manifest(plan: Plan, one: _Set) -> SetManifest:
    group = plan.data.group(one.name)
    return SetManifest(
        group=group,
        language=plan.data.sets[one.name].language or one.name,
        sources=[SourceFile(**file) for file in plan.info["files"][one.name]],
        train=None if group == "watch" else _counts(one.train),
        held_out=_counts(one.held_out),
        dropped=dict(sorted(one.dropped.items())),
        bad_rows=one.bad_rows,
        shards=one.shards,
        slices=len(one.slices),
        slices_beyond_budget=len(one.slices) - len(one.taken),
    )


def _statistics(plan: Plan, one: _Set) -> SetStatistics:
    group = plan.data.group(one.name)
    language = plan.data.sets[one.name].language or one.name
    held_out = part_statistics(one.held_out)
    train = None if group == "watch" else part_statistics(one.train)
    return SetStatistics(
        group=group,
        language=language,
        train=train,
        held_out=held_out,
        dropped=dict(sorted(one.dropped.items())),
        bad_rows=one.bad_rows,
        warning=fertility_warning(one.name, language, train or held_out),
    )
