"""The last phases: budgets are applied, and what is left of each set becomes its folder, manifest last."""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import fsync_path, link_or_copy, save_array, sha256_file, write_json, write_text
from data_prep.manifest import (
    HELD_OUT,
    MANIFEST,
    OWN_HELD_OUT,
    RUN_SIZES,
    RUNS,
    STATISTICS,
    BadRowsReport,
    Counts,
    Dropped,
    SetManifest,
    SourceFile,
    TextManifest,
    TrainShard,
)
from data_prep.phases.budgets import taken_of
from data_prep.phases.copies import record_copies
from data_prep.phases.filter import runs_of_set
from data_prep.plan import FILTER, TOKENIZE, Json, Plan, SetPlan, Slice
from data_prep.shards import Shard, ShardWriter, shard_paths
from data_prep.statistics.tally import Tally, part_statistics
from data_prep.store import SetFigures
from data_prep.tokenizer import FILES
from data_prep.work import Work

EXAMPLES = 20  # places that the manifest names of each kind of loss


@dataclass
class _Set:
    """One set as it is put together. `taken` says how many of each slice's training documents it keeps."""

    number: int
    plan: SetPlan
    folder: Path
    taken: dict[int, int] = field(default_factory=dict)
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

    def skip(self, found: Json) -> None:
        """Add bad rows."""
        examples = (self.bad_rows.examples + found["examples"])[:EXAMPLES]
        self.bad_rows = BadRowsReport(rows=self.bad_rows.rows + found["rows"], examples=examples)


def _folder_of(work: Work, one: SetPlan) -> Path:
    return work.folder / "sets" / one.key


def write_set(work: Work, number: int) -> Json:
    """Make the folder of one set within the work folder.

    Raises:
        UserError: nothing is left of the set to train on, or nothing is held out.
    """
    plan = work.plan.sets[number]
    one = _Set(number, plan, _folder_of(work, plan))
    shutil.rmtree(one.folder, ignore_errors=True)
    one.folder.mkdir(parents=True)
    slices = work.plan.slices_of(number)
    held_out = Counts()
    for part in slices if work.plan.is_filtered_first(plan) else ():
        figures = work.figures(FILTER, part.number)
        one.drop(figures["dropped"])
        one.skip(figures["bad_rows"])
        held_out = Counts(
            **{unit: getattr(held_out, unit) + figures["held_out"][unit] for unit in figures["held_out"]}
        )
    runs = runs_of_set(work, number)
    for name, values in ((RUNS, runs.runs), (RUN_SIZES, runs.sizes)):
        save_array(one.folder / name, values)
        one.files[name] = sha256_file(one.folder / name)
    if plan.group == "benchmark":
        manifest = TextManifest(held_out=held_out, **_text_manifest(work.plan, one))
    else:
        manifest = _write_shards(work, one, slices)
    write_json(one.folder / MANIFEST, manifest.model_dump(mode="json"))
    return {}


def publish(work: Work, _task: int) -> Json:
    """Move every finished set to its place in the cache, and keep the counts of copies there."""
    for one in work.plan.sets:
        target = work.tokens / one.key
        if one.is_written and not (target / MANIFEST).is_file():  # else another run was first
            _move(_folder_of(work, one), target)
    fsync_path(work.tokens)
    record_copies(work)
    return {}


def _move(folder: Path, target: Path) -> None:
    try:
        os.rename(folder, target)
    except OSError:
        if (target / MANIFEST).is_file():  # another run was first by a moment
            return
        shutil.rmtree(target, ignore_errors=True)  # what is there is not a finished set
        os.rename(folder, target)


def _write_shards(work: Work, one: _Set, slices: list[Slice]) -> SetManifest:
    """Write all that a set has besides the runs of its held-out text; the manifest is left to the caller."""
    plan = work.plan
    one.taken = taken_of(work, one.number) if one.plan.trains else {part.number: 0 for part in slices}
    for part in slices:
        if part.number in one.taken:
            _add_slice(work, one, part)
    _join_held_out(work, one)
    _check_not_empty(plan, one)
    train = part_statistics(one.train) if one.plan.trains else None
    figures = SetFigures(train=train, held_out=part_statistics(one.held_out))
    write_json(one.folder / STATISTICS, figures.model_dump(mode="json"))
    tokenizer = FILES[plan.tokenizer.kind]
    shutil.copyfile(work.folder / tokenizer, one.folder / tokenizer)
    one.files |= {name: sha256_file(one.folder / name) for name in (STATISTICS, tokenizer)}
    return SetManifest(
        tokenizer=plan.tokenizer_name,
        tokenizer_key=plan.tokenizer.key,
        own_tokenizer_key=None if plan.own_tokenizer is None else plan.own_tokenizer.key,
        separator=plan.tokenizer.separator,
        separator_id=plan.tokenizer.separator_id,
        bos_id=plan.tokenizer.bos_id,
        dtype=plan.dtype,
        train=_counts(one.train) if one.plan.trains else None,
        held_out=_counts(one.held_out),
        shards=one.shards,
        slices=len(slices),
        slices_beyond_budget=len(slices) - len(one.taken),
        **_text_manifest(plan, one),
    )


def _text_manifest(plan: Plan, one: _Set) -> Json:
    return {
        "key": one.plan.key,
        "settings": one.plan.settings,
        "sources": [SourceFile(**file) for file in one.plan.files],
        "dropped": dict(sorted(one.dropped.items())),
        "bad_rows": one.bad_rows,
        "files": dict(sorted(one.files.items())),
        "versions": plan.versions,
    }


def _add_slice(work: Work, one: _Set, part: Slice) -> None:
    figures = work.figures(TOKENIZE, part.number)
    one.drop(figures["dropped"])
    one.skip(figures["bad_rows"])
    one.held_out.merge(figures["held_out"])
    count = one.taken[part.number]
    if not count:
        return
    shard = f"train/{part.place:05d}"
    prefix = one.folder / shard
    prefix.parent.mkdir(exist_ok=True)
    source = work.path(TOKENIZE, part.number, ".train")
    train = figures["train"]
    if count == train["documents"]:
        for path, new in zip(shard_paths(source), shard_paths(prefix), strict=True):
            link_or_copy(path, new)
        sha256 = train["sha256"]
    else:
        train, sha256 = _shorten(work, one, part, prefix)
    one.train.merge(train)
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


def _join_held_out(work: Work, one: _Set) -> None:
    """One shard of all held-out documents, in the order of slices, and a line for each."""
    for name in (HELD_OUT, *([OWN_HELD_OUT] if work.plan.own_tokenizer is not None else [])):
        with ShardWriter(one.folder / name, work.plan.dtype) as writer:
            for number in sorted(one.taken):
                shard = Shard(work.path(TOKENIZE, number, f".{name}"))
                for index in range(shard.num_documents):
                    writer.append(shard.document(index))
        described = (work.path(TOKENIZE, number, f".{name}.jsonl") for number in sorted(one.taken))
        lines = one.folder / f"{name}.jsonl"
        write_text(lines, "".join(path.read_text(encoding="utf-8") for path in described))
        one.files |= {f"{name}{suffix}": value for suffix, value in writer.sha256.items()}
        one.files[lines.name] = sha256_file(lines)


def _check_not_empty(plan: Plan, one: _Set) -> None:
    where = one.plan.where
    lost = ", ".join(f"{found.documents} {reason}" for reason, found in sorted(one.dropped.items()))
    lost = f" ({lost} dropped)" if lost else ""
    bad = f", {one.bad_rows.rows} bad rows skipped" if one.bad_rows.rows else ""
    own = one.plan.entry.held_out_fraction
    fraction = f"{where}.held_out_fraction={own:g}" if own else f"data.held_out.fraction={plan.fraction:g}"
    if one.plan.trains and not one.taken:
        raise UserError(
            f"{where}: not one document fits its budgets (data.replay, max_tokens){lost}{bad}; give it larger ones"
        )
    if not one.held_out.documents:
        if not one.plan.trains:
            raise UserError(f"{where}: no document with text{lost}{bad}; name another path")
        raise UserError(
            f"{where}: none of {one.train.documents} documents is held out at {fraction}{lost}{bad}; "
            f"raise the fraction ({where}.held_out_fraction is this set's alone) or give more documents"
        )
    if one.plan.trains and not one.train.documents:
        raise UserError(
            f"{where}: no document is left to train on, {one.held_out.documents} are held out at "
            f"{fraction}{lost}{bad}; lower the fraction, give more documents or larger budgets (data.replay, "
            "max_tokens)"
        )


def _counts(tally: Tally) -> Counts:
    return Counts(documents=tally.documents, tokens=tally.tokens, bytes=tally.bytes, characters=tally.characters)
