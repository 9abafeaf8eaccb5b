"""What a run names on the Hugging Face hub, downloaded and pinned to a commit; later steps open no connection.

``fetched.json`` in the run's folder says which commit stands for each name. A run that is read again has the
folder of that commit in its model's place, so that no step asks the hub.
"""

import os
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import read_json, write_json
from data_prep.reading.hub import hub_failures, name_of
from pipeline.config.run import RunConfig
from pipeline.records.run_folder import FETCHED_FILE, RunFolder
from pipeline.run.fetch_datasets import entry_name, fetch_dataset, named_datasets, with_commits

MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
OLD_WEIGHTS = ["*.bin", "*.bin.index.json"]  # of models that have no safetensors


def fetch_run(run: RunConfig) -> None:
    """Download what the run names on the hub, and note the commits.

    Raises:
        UserError: the hub can't be reached, or does not give it.
    """
    models = {}
    for key, name, asked in _named_models(run):
        models[name] = fetched = _fetch_model(key, name, asked)
        print(f"fetch: {name} at {fetched['commit']}: {fetched['folder']}", flush=True)
    path = RunFolder(run.folder) / FETCHED_FILE
    write_json(path, {"models": models, "datasets": {}})
    datasets: dict[str, Any] = {}
    with_model = with_fetched(run) if named_datasets(run) else run
    for source in named_datasets(run):
        datasets[entry_name(source)] = entry = fetch_dataset(source, with_model)
        print(f"fetch: {name_of(source)} at {entry['commit']}: {entry['files']} files", flush=True)
    if not models and not datasets:
        print("fetch: the run names nothing on the hub", flush=True)
    write_json(path, {"models": models, "datasets": datasets})


def with_fetched(run: RunConfig) -> RunConfig:
    """The run with what was fetched in the place of names; where that is all, the hub's client is told to stay away.

    Raises:
        UserError: what was fetched is gone.
    """
    path = RunFolder(run.folder) / FETCHED_FILE
    if not path.is_file():
        return run
    fetched = read_json(path)
    models: dict[str, Any] = fetched["models"]
    data = with_commits(run, fetched["datasets"])
    changes: dict[str, Any] = {}
    missing = any(entry_name(source) not in fetched["datasets"] for source in named_datasets(run))
    for key, name, asked in _named_models(run):
        entry = models.get(name)
        if entry is None or entry["asked"] != asked:
            missing = True
        elif not Path(entry["folder"]).is_dir():
            raise UserError(f"{key}: {name} was fetched to {entry['folder']}, which is gone; fetch it again")
        elif key == "model.path":
            changes["model"] = run.model.model_copy(update={"path": entry["folder"], "revision": None})
        else:
            data["tokenizer"] = entry["folder"]
    if not missing:
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    return run.model_copy(update={**changes, "data": run.data.model_copy(update=data)})


def _named_models(run: RunConfig) -> list[tuple[str, str, str | None]]:
    """The run's key, the hub's name and the revision that is asked for, of everything that is not a folder here."""
    named = [("model.path", run.model.path, run.model.revision)]
    if run.data.tokenizer is not None:
        named.append(("data.tokenizer", run.data.tokenizer, None))
    return [entry for entry in named if is_hub_name(entry[1])]


def is_hub_name(path: str) -> bool:
    """Whether this is owner/name, rather than a file or folder."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).exists()


def _fetch_model(key: str, name: str, asked: str | None) -> dict[str, str | None]:
    from huggingface_hub import HfApi, snapshot_download

    with hub_failures(
        f"{key}: the hub does not give {name}{f' at {asked}' if asked else ''}",
        "check the name and revision, and fetch on a host with a network",
    ):
        info = HfApi().model_info(name, revision=asked)
        names = [sibling.rfilename for sibling in info.siblings or []]
        weights = [] if any(file.endswith(".safetensors") for file in names) else OLD_WEIGHTS
        folder = snapshot_download(name, revision=info.sha, allow_patterns=MODEL_FILES + weights)
    return {"asked": asked, "commit": info.sha, "folder": folder}
