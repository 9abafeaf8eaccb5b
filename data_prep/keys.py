"""What a set's content depends on, and so what its key is made of: no names, no paths, no weights.

A set's text key says which documents it has and which of them are held out. Its key says besides what is done to
them. Equal keys are equal bytes, whatever a run calls the set and wherever its files lie.
"""

import importlib.metadata
import math
from dataclasses import asdict
from pathlib import Path

import rensa

from common.files import content_key, sha256_file
from data_prep.config import CapsConfig, DataConfig, FiltersConfig, SetConfig
from data_prep.plan import Budget, FoundSet, Group, Json, SetPlan
from data_prep.reading.sources import compression_of, format_of

FORMAT_VERSION = 3  # part of every key: raise it when the same inputs give other files


def text_settings(data: DataConfig, group: Group, entry: SetConfig, files: list[Json], seed: int, held: float) -> Json:
    """What a set's documents are, and which of them are held out of training.

    Args:
        data: the run's settings of text.
        group: whether the set is trained on, watched, or a benchmark.
        entry: the set's own settings.
        files: its files as its manifest describes them, with sha256 and source.
        seed: of the choice of held-out documents.
        held: the share of pages that is held out of training sets, unless a set has its own.
    """
    settings: Json = {
        "format_version": FORMAT_VERSION,
        "kind": group if group in ("watch", "benchmark") else "train",
        "sources": [
            {
                "text_field": source.text_field,
                "files": [_content(file, source.hub, source.text_unit) for file in files if file["source"] == number],
            }
            for number, source in enumerate(entry.source_list)
        ],
        "bad_rows": data.bad_rows,
        "max_document_bytes": data.max_document_bytes,
        "slice_bytes": data.slice_bytes,
        "page_field": None if group == "benchmark" else data.held_out.by,
    }
    if settings["kind"] == "train":
        share = entry.held_out_share(held)
        settings |= {"seed": seed, "held_out_fraction": share, "filters": _filters(data.filters, entry)}
    return settings


def _content(file: Json, hub: str | None, text_unit: str) -> list[str]:
    if hub is not None:
        return ["hub", file["sha256"]]
    path = Path(file["path"])
    return [f"{format_of(path, text_unit)}{compression_of(path)}", file["sha256"]]


def _filters(filters: FiltersConfig, entry: SetConfig) -> Json:
    """The filters of single documents; of the language filter, the model by content and the set's label."""
    found = filters.model_dump(mode="json", exclude={"language", "exact_duplicates", "near_duplicates"})
    if filters.fix_text:
        found["ftfy"] = importlib.metadata.version("ftfy")
    if filters.language is not None:
        path = Path(filters.language.identifier)
        found["language"] = {
            "identifier": sha256_file(path) if path.is_file() else filters.language.identifier,
            "threshold": filters.language.threshold,
            "label": entry.language_label or entry.language,
            "py3langid": importlib.metadata.version("py3langid"),
        }
    return found


def with_keys(
    data: DataConfig,
    sets: list[FoundSet],
    seed: int,
    fraction: float,
    encoding: Json,
    replay: dict[str, Budget],
) -> list[SetPlan]:
    """Every set with its key.

    Args:
        data: the run's settings of text.
        sets: the sets, benchmarks last.
        seed: the run's.
        fraction: the share of pages that is held out, unless a set has its own.
        encoding: what the ids depend on: the tokenizer's key and the dtype.
        replay: by old set, its part of the run's replay.
    """
    corpora = [text_settings(data, one.group, one.entry, one.files, seed, fraction) for one in sets]
    texts = [corpus | _part(one, seed) for one, corpus in zip(sets, corpora, strict=True)]
    text_keys = [content_key(text) for text in texts]
    trained = [key for key, text in zip(text_keys, texts, strict=True) if text["kind"] == "train"]
    threshold = data.held_out.near_copy_threshold
    planned = []
    place = 0
    for one, corpus, text, text_key in zip(sets, corpora, texts, text_keys, strict=True):
        name, group, entry = one.name, one.group, one.entry
        settings: Json = {"text": text}
        if group != "benchmark":
            settings |= encoding
        if text["kind"] == "train":
            budget = replay.get(name) if group == "old" else None
            settings |= {
                "caps": _caps(entry),
                "source_caps": [_caps(source) for source in entry.sources],
                "replay": None if budget is None else asdict(budget),
                "duplicates": _duplicates(data.filters, trained, place),
                "near_copy_threshold": threshold,
                "cleaned_of": [] if threshold is None else sorted(set(text_keys)),
            }
            place += 1
        keys = (content_key(corpus), text_key, content_key(settings))
        planned.append(SetPlan(name, group, entry, replay.get(name), *keys, settings, one.files, one.read))
    return planned


def _part(one: FoundSet, seed: int) -> Json:
    """Which part of a set's text is read, where it is not all of it: so many slices of each source, by the seed."""
    part: Json = {}
    if len(one.read) < len(one.slices):
        sources = [source for source, _ in one.read]
        part = {"slices": [sources.count(source) for source in range(len(one.entry.source_list))], "seed": seed}
    if one.group == "watch" and one.entry.max_documents is not None:
        part["max_documents"] = one.entry.max_documents
    return part


def _caps(entry: CapsConfig) -> Json:
    return asdict(Budget(*entry.caps))


def _duplicates(filters: FiltersConfig, texts: list[str], place: int) -> Json | None:
    """Where duplicates are looked for, all training sets matter, in their order, and the set's place among them."""
    if not filters.duplicates:
        return None
    near = filters.near_duplicates
    return {
        "near": None if near is None else near.model_dump(mode="json"),
        "rensa": None if near is None else str(rensa.RMinHash.ALGORITHM_VERSION),
        "texts": texts,
        "place": place,
    }


def replay_budgets(data: DataConfig, stage1_tokens: int | None) -> dict[str, Budget]:
    """Each old set's part of `data.replay`, by its weight; a share of stage 1 needs `stage1_tokens`."""
    replay = data.replay
    if replay is None or not data.old or (replay.share is not None and stage1_tokens is None):
        return {}
    tokens = replay.tokens if replay.share is None else math.ceil(replay.share * (stage1_tokens or 0))
    total = sum(entry.weight for entry in data.old.values())

    def part(budget: int | None, weight: float) -> int | None:
        return None if budget is None else max(1, math.floor(budget * weight / total))

    return {
        name: Budget(tokens=part(tokens, entry.weight), characters=part(replay.characters, entry.weight))
        for name, entry in data.old.items()
    }


def differs_only_in_cleaning(kept: Json, wanted: Json) -> bool:
    """Whether two training sets' settings agree in all but the held-out texts they were cleaned of."""
    return {**kept, "cleaned_of": None} == {**wanted, "cleaned_of": None}
