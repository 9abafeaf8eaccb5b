"""From settings to a plan: the sources' files are hashed and cut, and all that the result depends on makes its key."""

import importlib.metadata
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import rensa

from common.errors import UserError
from common.files import content_key, read_json, sha256_file, write_json
from data_prep.config import DataConfig, FiltersConfig, SourceConfig
from data_prep.executor.pool import Executor, Phase
from data_prep.phases.replay import budgets
from data_prep.plan import Group, Json, Plan, Slice, Work
from data_prep.reading import hub
from data_prep.reading.file_splits import FileIndex, FileToIndex, Piece, pack
from data_prep.reading.sources import compression_of, format_of, source_files
from data_prep.tokenizer import DocumentEncoder, choose_dtype

FORMAT_VERSION = 2  # part of the content key: raise it when the same inputs give other shards
PACKAGES = ("tokenizers", "transformers", "sentencepiece", "rensa", "numpy")


class Inputs(NamedTuple):
    """What is prepared, for which model; `stage1_tokens` is what `data.replay.share` is a share of."""

    data: DataConfig
    tokenizer_path: str
    vocab_size: int
    cache_dir: Path
    seed: int
    revision: str | None = None
    stage1_tokens: int | None = None


class Planned(NamedTuple):
    """A plan, the tokenizer, and the folder that the store will be."""

    plan: Plan
    encoder: DocumentEncoder
    folder: Path


class _Read(NamedTuple):
    """One source as it was found: its set or benchmark, its number there, and its files or its dataset."""

    group: Group
    name: str
    number: int
    config: SourceConfig
    files: list[FileToIndex]


def make_plan(inputs: Inputs, executor: Executor) -> Planned:
    """Look at every source; files that are new or have changed are read once for their hash.

    Raises:
        UserError: a source, the tokenizer or a setting won't do.
    """
    data = inputs.data
    dtype = choose_dtype(data.token_dtype, inputs.vocab_size)
    encoder = DocumentEncoder.create(inputs.tokenizer_path, data.separator, inputs.vocab_size, inputs.revision)
    found = _find(data)
    slices, files = _cut(found, data.slice_bytes, inputs.cache_dir / "sources", executor)
    size = sum(part.size for part in slices if part.trains)
    fraction = min(data.held_out.fraction, data.held_out.max_megabytes * 2**20 / max(1, size))
    replay = budgets(data, inputs.stage1_tokens)
    settings = _settings(data, found, files) | {
        "tokenizer": encoder.spec.key,
        "dtype": dtype,
        "seed": inputs.seed,
        "replay": {name: asdict(budget) for name, budget in replay.items()},
    }
    folder = inputs.cache_dir / "tokens" / content_key(settings)
    info: Json = {
        "key": folder.name,
        "tokenizer": inputs.tokenizer_path,
        "settings": settings,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "files": {
            name: [file for one, group in zip(found, files, strict=True) if one.name == name for file in group]
            for name in data.sets
        },
    }
    plan = Plan(data, inputs.seed, fraction, dtype, encoder.spec, replay, slices, info)
    return Planned(plan, encoder, folder)


def check_tokenizer(inputs: Inputs, encoder: DocumentEncoder, force: bool) -> None:
    """Remember the tokenizer's definition by where it lies.

    Raises:
        UserError: it is another than the last time, and `force` does not say that this is meant.
    """
    memory, path = inputs.cache_dir / "tokenizers.json", inputs.tokenizer_path
    known: dict[str, str] = read_json(memory) if memory.is_file() else {}
    name = str(Path(path).resolve()) if Path(path).exists() else f"{path}@{inputs.revision or ''}"
    definition = encoder.spec.definition
    if known.get(name, definition) != definition and not force:
        raise UserError(
            f"{path}: the tokenizer has changed since the last run (was {known[name][:12]}, is {definition[:12]}): "
            "its ids no longer fit what was prepared or trained with it; put the old one back, or add --force to "
            "prepare the text with this one"
        )
    if known.get(name) != definition:
        write_json(memory, {**known, name: definition})


def _find(data: DataConfig) -> list[_Read]:
    """Every source in the order of sets, benchmarks last, with its files; an error names the key."""
    sources: list[tuple[Group, str, int, SourceConfig]] = [
        (data.group(name), name, number, source)
        for name, entry in data.sets.items()
        for number, source in enumerate(entry.source_list)
    ]
    sources += [("benchmark", name, 0, source) for name, source in data.benchmarks.items()]
    found = []
    for group, name, number, source in sources:
        key = f"data.{'benchmarks' if group == 'benchmark' else group}.{name}"
        try:
            paths = source_files(source) if source.hub is None else []
        except UserError as error:
            raise UserError(f"{key}.path: {error}") from error
        files = [FileToIndex(str(path), source.text_field, source.text_unit, data.slice_bytes) for path in paths]
        found.append(_Read(group, name, number, source, files))
    return found


def _cut(
    found: list[_Read], slice_bytes: int, memory: Path, executor: Executor
) -> tuple[list[Slice], list[list[Json]]]:
    """The slices of all sources, and what the manifest says of each source's files."""
    every = list(dict.fromkeys(file for one in found for file in one.files))
    markers = {number: file.index_path(memory) for number, file in enumerate(every)}
    sizes = {number: Path(file.path).stat().st_size for number, file in enumerate(every)}
    arguments = {"files": [asdict(file) for file in every]}
    executor.run(
        Phase(Work(memory), "index", list(markers), arguments, label="hash sources", weights=sizes, markers=markers)
    )
    slices: list[Slice] = []
    described: list[list[Json]] = []
    for one in found:
        pieces, files = _of_hub(one, slice_bytes) if one.config.hub is not None else _of_files(one, memory)
        described.append(files)
        for part in pack(pieces, slice_bytes):
            slices.append(Slice(len(slices), one.group, one.name, one.number, part))
    return slices, described


def _of_files(one: _Read, memory: Path) -> tuple[list[Piece], list[Json]]:
    indices = [FileIndex.load(file.index_path(memory)) for file in one.files]
    files: list[Json] = [
        {"path": file.path, "sha256": index.sha256, "bytes": index.bytes, "source": one.number}
        for file, index in zip(one.files, indices, strict=True)
    ]
    # The index may have been made when the file was named otherwise.
    return [piece for index in indices for piece in index.pieces], files


def _of_hub(one: _Read, slice_bytes: int) -> tuple[list[Piece], list[Json]]:
    pinned = hub.pin(hub.hub_source(one.config))
    name = hub.name_of(pinned)
    pieces = [Piece(name, "hub", number, number + 1, 1, slice_bytes) for number in range(hub.count_files(pinned))]
    return pieces, [{"path": name, "sha256": hub.content_of(pinned), "bytes": 0, "source": one.number}]


def _settings(data: DataConfig, found: list[_Read], files: list[list[Json]]) -> Json:
    """All that the shards' content depends on, and nothing else: no paths, no names of runs, no weights."""
    caps = {"max_documents", "max_tokens", "max_characters"}
    sources = [
        {
            "group": one.group,
            "set": one.name,
            "text_field": one.config.text_field,
            "caps": one.config.model_dump(include=caps),
            "files": [_content(one, file) for file in group],
        }
        for one, group in zip(found, files, strict=True)
    ]
    filters = data.filters
    used = {
        "rensa": str(rensa.RMinHash.ALGORITHM_VERSION) if filters.near_duplicates else None,
        "ftfy": importlib.metadata.version("ftfy") if filters.fix_text else None,
        "py3langid": importlib.metadata.version("py3langid") if filters.language else None,
    }
    return {
        "format_version": FORMAT_VERSION,
        "held_out": data.held_out.model_dump(mode="json"),
        "filters": filters.model_dump(mode="json") | {"versions": used, "language": _identifier(filters)},
        "bad_rows": data.bad_rows,
        "max_document_bytes": data.max_document_bytes,
        "slice_bytes": data.slice_bytes,
        "sets": {
            name: {
                "group": data.group(name),
                "language": entry.language or name,
                "label": entry.language_label,
                "caps": entry.model_dump(include=caps),
            }
            for name, entry in data.sets.items()
        },
        "sources": sources,
    }


def _identifier(filters: FiltersConfig) -> Json | None:
    """The language filter's settings, its model by content, not by path."""
    if filters.language is None:
        return None
    path = Path(filters.language.identifier)
    name = sha256_file(path) if path.is_file() else filters.language.identifier
    return {"identifier": name, "threshold": filters.language.threshold}


def _content(one: _Read, file: Json) -> list[str]:
    if one.config.hub is not None:
        return ["hub", file["sha256"]]
    path = Path(file["path"])
    return [f"{format_of(path, one.config.text_unit)}{compression_of(path)}", file["sha256"]]
