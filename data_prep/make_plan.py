"""From settings to a plan: sources are hashed and cut, every set gets its key, and what is missing is planned."""

import importlib.metadata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import UserError
from common.files import content_key, read_json, write_json
from data_prep.config import CapsConfig, DataConfig, PlaceConfig, PreparationConfig, SetConfig, SourceConfig
from data_prep.encoders import Encoders, make_encoders
from data_prep.executor.pool import Executor, Phase
from data_prep.keys import differs_only_in_cleaning, replay_budgets, with_keys
from data_prep.manifest import MANIFEST, SetManifest, read_manifest
from data_prep.plan import FoundSet, Group, HeldOutText, Json, KeptSet, Plan, SetPlan, Slices
from data_prep.reading import hub
from data_prep.reading.file_splits import FileIndex, FileSplit, FileToIndex, hub_split, index_file, pack
from data_prep.reading.sources import source_files
from data_prep.slices_to_read import size_of, slices_to_read
from data_prep.tokenizer import DocumentEncoder
from data_prep.work import Work, copies_record

PACKAGES = ("tokenizers", "transformers", "sentencepiece", "rensa", "numpy")


@dataclass(frozen=True)
class Planned:
    """What a run wants: every set with its key, and the tokenizer.

    Attributes:
        config: what the run says of its text.
        encoders: the tokenizer.
        fraction: the share of pages that is held out.
        sets: the sets, benchmarks last.
        corpora: by training set, all slices of its text; its budgets may need fewer.
        keep: keys, by name, of training sets that training has begun with. Such a set is kept if it is in the cache
            and differs from the wanted one only in the held-out texts it was cleaned of.
    """

    config: PreparationConfig
    encoders: Encoders
    fraction: float
    sets: list[SetPlan]
    corpora: dict[str, Slices]
    keep: Mapping[str, str]

    @cached_property
    def keys(self) -> dict[str, str]:
        """The wanted key of each of the run's sets, by name, without benchmarks."""
        return {one.name: one.key for one in self.sets if one.group != "benchmark"}

    @cached_property
    def kept_keys(self) -> dict[str, str]:
        """The key of each set, by name, that the store will have: the wanted one, or that of a kept set."""
        keys = dict(self.keys)
        for one in self.sets:
            kept = self.keep.get(one.name)
            if kept is None or kept == one.key or not one.trains or not self.has(kept):
                continue
            if differs_only_in_cleaning(read_manifest(self.tokens / kept, SetManifest).settings, one.settings):
                keys[one.name] = kept
        return keys

    @cached_property
    def held_out_texts(self) -> list[HeldOutText]:
        """All that training documents are compared with, each text once, in the order of their keys."""
        if self.config.data.held_out.near_copy_threshold is None:
            return []
        found: dict[str, HeldOutText] = {}
        for one in self.sets:
            key = one.key if one.group == "benchmark" else self.kept_keys[one.name]
            found.setdefault(one.text, HeldOutText(one.text, one.group == "benchmark", key))
        return [found[text] for text in sorted(found)]

    @cached_property
    def kept_sets(self) -> list[KeptSet]:
        """The training sets that are kept though they were not cleaned of all that is wanted."""
        texts = [text.text for text in self.held_out_texts]
        found: dict[str, KeptSet] = {}
        for name, key in self.kept_keys.items():
            if key == self.keys[name]:
                continue
            manifest = read_manifest(self.tokens / key, SetManifest)
            cleaned_of = manifest.settings["cleaned_of"]
            new = [number for number, text in enumerate(texts) if text not in cleaned_of]
            if new:
                record = content_key([key, [texts[number] for number in new]])
                found[key] = KeptSet(key, [shard.name for shard in manifest.shards], new, record)
        return list(found.values())

    @property
    def encoder(self) -> DocumentEncoder:
        """The tokenizer that encodes the run's text."""
        return self.encoders.encoder

    @property
    def dense_encoder(self) -> DocumentEncoder:
        """The dense model's tokenizer: the run's, unless that extends it."""
        return self.encoders.own or self.encoders.encoder

    @property
    def tokenizer_key(self) -> str:
        """Changes with anything that changes a document's ids."""
        return self.encoder.spec.key

    @property
    def tokens(self) -> Path:
        """The folder of finished sets."""
        return self.config.cache_dir / "tokens"

    def has(self, key: str) -> bool:
        """Whether a set is in the cache."""
        return (self.tokens / key / MANIFEST).is_file()

    @property
    def is_prepared(self) -> bool:
        """Whether all of the run's sets are in the cache, with those that are kept."""
        return all(map(self.has, self.kept_keys.values()))


def make_plan(config: PreparationConfig, executor: Executor, keep: Mapping[str, str]) -> Planned:
    """Look at every source; files that are new or have changed are read once for their hash.

    Raises:
        UserError: a source, the tokenizer or a setting can't be used.
    """
    data = config.data
    encoders = make_encoders(config)
    encoder = encoders.encoder
    found = _find(data)
    memory = config.cache_dir / "sources"
    cuts = _cut(found, data.slice_bytes, memory, executor)
    replay = replay_budgets(data, config.stage1_tokens)
    sets = []
    for name, group, entry in _entries(data):
        mine = [(one, *cut) for one, cut in zip(found, cuts, strict=True) if (one.name, one.group) == (name, group)]
        files = [file for _, _, described in mine for file in described]
        slices = [(one.number, part) for one, splits, _ in mine for part in pack(splits, data.slice_bytes)]
        whole = FoundSet(name, group, entry, files, slices, slices)
        read = slices_to_read(data, whole, replay.get(name), config.text_seed, encoder, memory)
        sets.append(whole._replace(read=read))
    size = sum(size_of(one.read) for one in sets if one.group in ("old", "new"))
    fraction = min(data.held_out.fraction, data.held_out.max_megabytes * 2**20 / max(1, size))
    encoding: Json = {"tokenizer": encoder.spec.key, "dtype": encoders.dtype}
    if encoders.own is not None:
        encoding["own_tokenizer"] = encoders.own.spec.key
    planned = with_keys(data, sets, config.text_seed, fraction, encoding, replay)
    corpora = {one.name: one.slices for one in sets if one.group in ("old", "new")}
    return Planned(config, encoders, fraction, planned, corpora, keep)


def plan_of(planned: Planned) -> Plan:
    """What is to be done: the sets that are missing, and the kept ones whose copies have not been counted."""
    data, kept = planned.config.data, planned.kept_keys
    sets: dict[str, SetPlan] = {}
    for one in planned.sets:
        is_written = not planned.has(kept.get(one.name, one.key) if one.group != "benchmark" else one.key)
        known = sets.get(one.key)
        if known is None or not known.is_written:
            sets[one.key] = replace(one, is_written=is_written)
    reads_all = data.filters.duplicates and any(one.trains and one.is_written for one in sets.values())
    return Plan(
        data,
        planned.config.text_seed,
        planned.fraction,
        planned.encoders.dtype,
        planned.encoder.spec,
        planned.config.tokenizer[0],
        [one for one in sets.values() if one.is_written or (reads_all and one.trains)],
        planned.held_out_texts,
        [one for one in planned.kept_sets if not copies_record(planned.tokens, one.record).is_file()],
        {name: importlib.metadata.version(name) for name in PACKAGES},
        None if planned.encoders.own is None else planned.encoders.own.spec,
    )


def check_tokenizer(config: PreparationConfig, encoder: DocumentEncoder, force: bool) -> None:
    """Remember the tokenizer's definition by where it lies.

    Raises:
        UserError: it is another than the last time, and `force` does not say that this is meant.
    """
    memory, (path, revision) = config.cache_dir / "tokenizers.json", config.tokenizer
    known: dict[str, str] = read_json(memory) if memory.is_file() else {}
    name = str(Path(path).resolve()) if Path(path).exists() else f"{path}@{revision or ''}"
    definition = encoder.spec.definition
    if known.get(name, definition) != definition and not force:
        raise UserError(
            f"{path}: the tokenizer has changed since the last run (was {known[name][:12]}, is {definition[:12]}): "
            "its ids no longer fit what was prepared or trained with it; put the old one back, or add --force to "
            "prepare the text with this one"
        )
    if known.get(name) != definition:
        write_json(memory, {**known, name: definition})


class _Source(NamedTuple):
    """One source as it was found: its set or benchmark, its number there, and its files or its dataset."""

    group: Group
    name: str
    number: int
    config: SourceConfig
    files: list[FileToIndex]


def _entries(data: DataConfig) -> list[tuple[str, Group, SetConfig]]:
    """Name, group and settings of every set, benchmarks last."""
    sets: list[tuple[str, Group, SetConfig]] = [(name, data.group(name), entry) for name, entry in data.sets.items()]
    place = set(PlaceConfig.model_fields) - set(CapsConfig.model_fields)
    for name, source in data.benchmarks.items():
        sets.append((name, "benchmark", SetConfig(**source.model_dump(include=place), language=name)))
    return sets


def _find(data: DataConfig) -> list[_Source]:
    """Every source in the order of sets, benchmarks last, with its files; an error names the key."""
    found = []
    for name, group, entry in _entries(data):
        for number, source in enumerate(entry.source_list):
            try:
                paths = source_files(source) if source.hub is None else []
            except UserError as error:
                key = f"data.{'benchmarks' if group == 'benchmark' else group}.{name}"
                raise UserError(f"{key}.path: {error}") from error
            files = [FileToIndex(str(path), source.text_field, source.text_unit, data.slice_bytes) for path in paths]
            found.append(_Source(group, name, number, source, files))
    return found


def index_source(_work: Work, task: int, files: list[dict[str, Any]]) -> Json:
    """Hash and cut one file."""
    return index_file(FileToIndex(**files[task]))


def _cut(
    found: list[_Source], slice_bytes: int, memory: Path, executor: Executor
) -> list[tuple[list[FileSplit], list[Json]]]:
    """For each source its splits, and what the manifest says of its files."""
    every = list(dict.fromkeys(file for one in found for file in one.files))
    markers = {number: file.index_path(memory) for number, file in enumerate(every)}
    sizes = {number: Path(file.path).stat().st_size for number, file in enumerate(every)}
    arguments = {"files": [asdict(file) for file in every]}
    executor.run(
        Phase(Work(memory), "index", index_source, list(markers), arguments, "hash sources", sizes, markers=markers)
    )
    return [_of_hub(one, slice_bytes) if one.config.hub is not None else _of_files(one, memory) for one in found]


def _of_files(one: _Source, memory: Path) -> tuple[list[FileSplit], list[Json]]:
    indices = [FileIndex.load(file.index_path(memory)) for file in one.files]
    files: list[Json] = [
        {"path": file.path, "sha256": index.sha256, "bytes": index.bytes, "source": one.number}
        for file, index in zip(one.files, indices, strict=True)
    ]
    # The index may have been made when the file was named otherwise.
    return [split for index in indices for split in index.splits], files


def _of_hub(one: _Source, slice_bytes: int) -> tuple[list[FileSplit], list[Json]]:
    pinned = hub.pin(hub.hub_source(one.config))
    splits = [hub_split(name, size, slice_bytes) for name, size in hub.files_of(pinned)]
    return splits, [{"path": hub.name_of(pinned), "sha256": hub.content_of(pinned), "bytes": 0, "source": one.number}]
