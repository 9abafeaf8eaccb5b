"""The datasets of a run on the hub: at one commit, and only those files of a split that the run's budgets need."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from common.files import content_key
from common.progress import progress
from data_prep.config import DataConfig, SetConfig, SourceConfig
from data_prep.encoders import make_encoders
from data_prep.keys import replay_budgets
from data_prep.plan import FoundSet, Group, Slices
from data_prep.reading.file_splits import hub_split
from data_prep.reading.hub import (
    HubSource,
    data_file,
    file_name,
    hub_failures,
    hub_source,
    hub_sources,
    is_folder,
    name_of,
)
from data_prep.slices_to_read import LEAST, first_slices, limits_of, slices_to_read
from pipeline.config.run import RunConfig

if TYPE_CHECKING:
    from huggingface_hub.hf_api import DatasetInfo

CARD_FILES = ("README.md", ".gitattributes", "dataset_infos.json")  # they say which files a config has


def named_datasets(run: RunConfig) -> list[HubSource]:
    """What the run names on the hub, without folders."""
    return [source for source in hub_sources(run.data) if not is_folder(source.hub)]


def entry_name(source: HubSource) -> str:
    """What ``fetched.json`` calls it: its name, with a key of the files where the run names some."""
    return name_of(source) if source.data_files is None else f"{name_of(source)}#{content_key(source.data_files)}"


def fetch_dataset(source: HubSource, run: RunConfig) -> dict[str, Any]:
    """Download the files of one split that the run's budgets need into the hub's cache.

    Args:
        source: the split.
        run: the run, with its model and tokenizer in folders.

    Returns:
        The "commit"; the number of "files"; the "data_files" that were chosen, or None for all of the split; and the
        "license" that the dataset's card names, or None.

    Raises:
        UserError: the hub can't be reached, or does not give it.
    """
    from huggingface_hub import HfApi

    with hub_failures(
        f"data: the hub does not give {name_of(source)}",
        "check hub, config, split and revision, log in with: hf auth login, and fetch on a host with a network",
    ):
        info = HfApi().dataset_info(source.hub, revision=source.revision, files_metadata=True)
        assert info.sha is not None
        sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
        pinned = source._replace(revision=info.sha)
        names = [name for name in CARD_FILES if name in sizes]
        _download(pinned, names, sizes, show=False)
        every = list(source.data_files or _data_files(source, info.sha))
        chosen = _needed_files(pinned, run, every, sizes)
        _download(pinned, chosen, sizes)
    is_part = source.data_files is not None or len(chosen) < len(every)
    return {
        "commit": info.sha,
        "files": len(chosen) + len(names),
        "data_files": chosen if is_part else None,
        "license": _license(info),
    }


def _license(info: "DatasetInfo") -> str | None:
    """What the card's metadata names: one licence, or several."""
    named = None if info.card_data is None else info.card_data.get("license")
    return ", ".join(map(str, named)) if isinstance(named, list) else named


def _download(source: HubSource, names: list[str], sizes: dict[str, int], *, show: bool = True) -> None:
    from huggingface_hub import hf_hub_download

    if show:
        gigabytes = sum(sizes[name] for name in names) / 1e9
        print(f"fetch: {name_of(source)}: {len(names)} files, {gigabytes:.2f} GB", flush=True)
    with progress(len(names), f"fetch {source.hub}", "file", show=show) as bar:
        for name in names:
            # One by one: a listing of the whole dataset in the cache would make this part look torn.
            hf_hub_download(source.hub, name, repo_type="dataset", revision=source.revision)
            bar.update(1)


def _needed_files(source: HubSource, run: RunConfig, files: list[str], sizes: dict[str, int]) -> list[str]:
    """Those of a split's files that the sets which name it read; how many they are is measured on the first few."""
    data, memory = run.data, run.cache_dir / "sources"
    replay = replay_budgets(data, run.preparation.stage1_tokens)
    needed: set[str] = set()
    splits = [hub_split(file_name(source, file), sizes[file] or None, data.slice_bytes) for file in files]
    for set_name, entry, number in _uses(source, data):
        slices = [(number, [split]) for split in splits]
        group: Group = "benchmark" if set_name is None else data.group(set_name)
        budget = replay.get(set_name or "")
        found = FoundSet(set_name or "", group, entry, [{"source": number, "sha256": name_of(source)}], slices, slices)
        if group in ("old", "new") and len(files) > LEAST and limits_of(entry, number, budget):
            _download(source, _files_of(first_slices(slices, run.seed)), sizes)
            encoder = make_encoders(run.preparation).encoder
            slices = slices_to_read(data, found, budget, run.seed, encoder, memory)
        elif group == "watch":
            slices = slices_to_read(data, found, None, run.seed, None, memory)
        needed |= set(_files_of(slices))
    return [file for file in files if file in needed]


def _files_of(slices: Slices) -> list[str]:
    return [data_file(split.file) for _, splits in slices for split in splits]


def _uses(source: HubSource, data: DataConfig) -> Iterator[tuple[str | None, SetConfig, int]]:
    """The sets of which a split is a source, and the source's number there; a benchmark has no name."""
    asked = source._replace(revision=None)
    for name, entry in data.sets.items():
        for number, one in enumerate(entry.source_list):
            if one.hub is not None and hub_source(one)._replace(revision=None) == asked:
                yield name, entry, number
    for one in data.benchmarks.values():
        if one.hub is not None and hub_source(one)._replace(revision=None) == asked:
            yield None, SetConfig(hub=one.hub), 0


def _data_files(source: HubSource, commit: str) -> list[str]:
    """The split's files, as `datasets` finds them."""
    from datasets import load_dataset_builder

    builder = load_dataset_builder(source.hub, source.config, revision=commit)
    data_files = builder.config.data_files or {}
    if source.split not in data_files:
        raise ValueError(f"it has the splits {sorted(map(str, data_files))}")
    start = f"hf://datasets/{source.hub}@{commit}/"
    return [str(name).removeprefix(start) for name in data_files[source.split]]


def with_commits(run: RunConfig, fetched: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What changes in the run's ``data``: each hub source that was fetched has its commit and the chosen files."""

    def pinned(source: Any) -> Any:
        if source.hub is None:
            return source
        entry = fetched.get(entry_name(hub_source(source)))
        if entry is None:
            return source
        license = source.license or entry.get("license")
        return source.model_copy(
            update={"revision": entry["commit"], "data_files": entry["data_files"], "license": license}
        )

    def pinned_set(entry: SetConfig) -> SetConfig:
        sources: list[SourceConfig] = [pinned(source) for source in entry.sources]
        return pinned(entry).model_copy(update={"sources": sources})

    groups = {group: getattr(run.data, group) for group in ("old", "new", "watch")}
    changes: dict[str, Any] = {
        group: {name: pinned_set(entry) for name, entry in sets.items()} for group, sets in groups.items()
    }
    return changes | {"benchmarks": {name: pinned(source) for name, source in run.data.benchmarks.items()}}
