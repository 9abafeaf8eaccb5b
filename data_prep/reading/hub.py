"""Hugging Face datasets by name, read as a stream through `datasets`: nothing is converted or copied.

A source says {hub: owner/name, config:, split:, revision:}. Whatever downloads a dataset beforehand, so that nodes
without a network can read it, uses huggingface_hub's own cache:
`snapshot_download(hub, repo_type="dataset", revision=revision)`. A dataset that lies there is read from there; one
that does not is streamed from the hub. `hub` may also be a folder laid out as a dataset repository.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import UserError, one_line
from common.files import content_key, sha256_file
from data_prep.config import DataConfig, SourceConfig


class HubSource(NamedTuple):
    """What identifies one split of a dataset, or some of its files.

    `revision` is None where the run does not pin it; `data_files`, the files' names in the repository, where all are
    read.
    """

    hub: str
    config: str | None
    split: str
    revision: str | None
    data_files: tuple[str, ...] | None = None


@contextmanager
def hub_failures(what: str, fix: str) -> Iterator[None]:
    """Wraps calls of the hub's clients: whatever they raise becomes one line, "WHAT (why); FIX".

    Raises:
        UserError: something was raised.
    """
    from huggingface_hub.errors import GatedRepoError

    try:
        yield
    except UserError:
        raise
    except GatedRepoError as error:
        raise UserError(f"{what} (gated); accept its terms on the hub, then log in with: hf auth login") from error
    except Exception as error:  # noqa: BLE001 - the clients raise their own, requests' and OSError
        raise UserError(f"{what} ({type(error).__name__}: {one_line(error)}); {fix}") from error


def hub_sources(data: DataConfig) -> list[HubSource]:
    """Every hub dataset that a run names, each once, in the run's order."""
    entries = [source for entry in data.sets.values() for source in entry.source_list]
    return list(dict.fromkeys(hub_source(s) for s in [*entries, *data.benchmarks.values()] if s.hub is not None))


def hub_source(source: SourceConfig) -> HubSource:
    """The dataset that a source names."""
    assert source.hub is not None
    files = None if source.data_files is None else tuple(source.data_files)
    return HubSource(source.hub, source.config, source.split, source.revision, files)


def is_folder(hub: str) -> bool:
    """Whether `hub` is a folder here, not a name on the hub."""
    return Path(hub).is_dir()


def pin(source: HubSource) -> HubSource:
    """The source with the commit that its revision (a branch, a tag, or the default) stands for now.

    Raises:
        UserError: there is no such dataset, or it is neither in the cache nor can the hub be reached.
    """
    if is_folder(source.hub):
        return source
    cached = _cached_folder(source)
    if cached is not None:
        return source._replace(revision=cached.name)
    from huggingface_hub import HfApi

    with hub_failures(
        f"{source.hub}: not in the cache of downloads, and the hub does not give it",
        "check the name and revision, or fetch it where there is a network",
    ):
        found = HfApi().dataset_info(source.hub, revision=source.revision, timeout=30)
    assert found.sha is not None
    return source._replace(revision=found.sha)


def content_of(source: HubSource) -> str:
    """What the split's content is named by: its dataset and commit; of a folder, its files' hash."""
    folder = Path(source.hub)
    if not is_folder(source.hub):
        part = [] if source.data_files is None else [source.data_files]
        return content_key([source.hub, source.revision, source.config, source.split, *part])
    files = sorted(file for file in folder.rglob("*") if file.is_file() and ".git" not in file.parts)
    names = {str(file.relative_to(folder)): file for file in files}
    wanted = names if source.data_files is None else source.data_files
    hashes = {name: sha256_file(names[name]) for name in wanted if name in names}
    return content_key([hashes, source.config, source.split])


def files_of(source: HubSource) -> list[tuple[str, int | None]]:
    """The names of the split's data files for `read_hub`, each with its size in bytes where it lies here."""
    if source.data_files is None:
        return [(file_name(source, str(number)), None) for number in range(int(_stream(source).num_shards))]
    folder = Path(source.hub) if is_folder(source.hub) else _cached_folder(source)
    paths = {file: folder / file for file in source.data_files} if folder is not None else {}
    return [
        (file_name(source, file), paths[file].stat().st_size if file in paths and paths[file].is_file() else None)
        for file in source.data_files
    ]


def file_name(source: HubSource, file: str) -> str:
    """The name of one of the split's data files for `read_hub`."""
    return f"{name_of(source)}#{file}"


def data_file(name: str) -> str:
    """The data file that `file_name` named."""
    return name.partition("#")[2]


def read_hub(file: str, columns: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of one data file of a dataset, by a name that `files_of` gave."""
    source, which = source_of(file.partition("#")[0]), data_file(file)
    if which.isdigit():
        stream = _stream(source)
        part = stream.shard(num_shards=stream.num_shards, index=int(which))
    else:
        part = _stream(source._replace(data_files=(which,)))
    known = [column for column in columns if column in (part.column_names or columns)]
    for row in part.select_columns(known) if known and part.column_names else part:
        yield dict(row)


def name_of(source: HubSource) -> str:
    """Its full name: hub@revision:config:split."""
    return f"{source.hub}@{source.revision or ''}:{source.config or ''}:{source.split}"


def source_of(name: str) -> HubSource:
    """What `name_of` named."""
    rest, config, split = name.rsplit(":", 2)
    hub, _, revision = rest.rpartition("@")
    return HubSource(hub, config or None, split, revision or None)


def _cached_folder(source: HubSource) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(source.hub, repo_type="dataset", revision=source.revision, local_files_only=True)
    except (LocalEntryNotFoundError, ValueError):
        return None
    return Path(folder)


@lru_cache(maxsize=8)
def _stream(source: HubSource) -> Any:
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    from datasets import load_dataset

    cached = None if is_folder(source.hub) else _cached_folder(source)
    place = source.hub if cached is None else str(cached)
    revision = source.revision if cached is None and not is_folder(source.hub) else None
    with hub_failures(f"{name_of(source)}: can't be opened", "check hub, config, split and revision"):
        if source.data_files is not None:
            files = {source.split: list(source.data_files)}
            return load_dataset(place, data_files=files, split=source.split, revision=revision, streaming=True)
        return load_dataset(place, source.config, split=source.split, revision=revision, streaming=True)
