"""The datasets of a run on the hub: only the files of the config and split that it names, at one commit."""

from typing import Any

from common.progress import progress
from data_prep.config import SetConfig, SourceConfig
from data_prep.reading.hub import HubSource, hub_failures, hub_source, hub_sources, is_folder, name_of
from pipeline.config.run import RunConfig

CARD_FILES = ("README.md", ".gitattributes", "dataset_infos.json")  # they say which files a config has


def named_datasets(run: RunConfig) -> list[HubSource]:
    """What the run names on the hub, without folders."""
    return [source for source in hub_sources(run.data) if not is_folder(source.hub)]


def fetch_dataset(source: HubSource) -> dict[str, Any]:
    """Download one split's files into the hub's cache.

    Raises:
        UserError: the hub can't be reached, or does not give it.
    """
    from huggingface_hub import HfApi, hf_hub_download

    with hub_failures(
        f"data: the hub does not give {name_of(source)}",
        "check hub, config, split and revision, log in with: hf auth login, and fetch on a host with a network",
    ):
        info = HfApi().dataset_info(source.hub, revision=source.revision)
        assert info.sha is not None
        there = {sibling.rfilename for sibling in info.siblings or []}
        files = [name for name in CARD_FILES if name in there] + _data_files(source, info.sha)
        with progress(len(files), f"fetch {source.hub}", "file") as bar:
            for name in files:
                # One by one: a listing of the whole dataset in the cache would make this part look torn.
                hf_hub_download(source.hub, name, repo_type="dataset", revision=info.sha)
                bar.update(1)
    return {"commit": info.sha, "files": len(files)}


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
    """What changes in the run's ``data``: each hub source that was fetched has its commit as revision."""

    def pinned(source: Any) -> Any:
        if source.hub is None:
            return source
        entry = fetched.get(name_of(hub_source(source)))
        return source if entry is None else source.model_copy(update={"revision": entry["commit"]})

    def pinned_set(entry: SetConfig) -> SetConfig:
        sources: list[SourceConfig] = [pinned(source) for source in entry.sources]
        return pinned(entry).model_copy(update={"sources": sources})

    groups = {group: getattr(run.data, group) for group in ("old", "new", "watch")}
    changes: dict[str, Any] = {
        group: {name: pinned_set(entry) for name, entry in sets.items()} for group, sets in groups.items()
    }
    return changes | {"benchmarks": {name: pinned(source) for name, source in run.data.benchmarks.items()}}
