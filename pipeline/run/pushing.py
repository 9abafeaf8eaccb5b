"""The verb ``push``: an exported folder, with its card, as a model on the Hugging Face hub."""

from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError
from data_prep.reading.hub import hub_failures
from pipeline.run.context import RunContext
from pipeline.run.exporting import FOLDER

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"
OURS = (".safetensors", ".safetensors.index.json", ".py")  # of an earlier push: two models' would be mixed


def push_run(context: RunContext, to: str, folder: Path | None, *, private: bool) -> None:
    """Upload a folder that ``export`` has made; what the hub has already is not uploaded again.

    All files appear at once, in one commit; weights and code of an earlier push that the folder lacks go.

    Args:
        context: the run.
        to: owner/name of the model on the hub, which is made where it is not there.
        folder: the exported folder; ``export/`` in the run's folder without it.
        private: whether a model that is made is seen by its owner alone.

    Raises:
        UserError: there is no exported folder, or the hub does not take it.
    """
    source = folder or context.folder / FOLDER
    if not all((source / name).is_file() for name in (CARD, "config.json")):
        raise UserError(f"push: {source} is not an exported model; make it with: python -m pipeline export RUN.yaml")
    if to.count("/") != 1:
        raise UserError(f"--to {to}: give a model's name on the hub, such as --to owner/name")
    from huggingface_hub import HfApi

    with hub_failures(f"push: the hub does not take {to}", "check the name and that you may write: hf auth login"):
        api = HfApi()
        api.create_repo(to, private=private or None, exist_ok=True)
        commit, size = _upload(api, source, to, f"Upload {context.run.name}")
    print(f"push: {source} as {to} at {commit}, {size / 1e9:.2f} GB: {api.endpoint}/{to}", flush=True)


def _upload(api: "HfApi", source: Path, to: str, message: str) -> tuple[str, int]:
    """One commit of all files; returns it and how many bytes the files have."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    from pipeline.export.card import IN_CARD

    files = {str(file.relative_to(source)): file for file in sorted(source.rglob("*")) if file.is_file()}
    card = files[CARD].read_text(encoding="utf-8").replace(f'"{IN_CARD}"', f'"{to}"').encode()
    contents = {name: card if name == CARD else str(file) for name, file in files.items()}
    stale = [name for name in api.list_repo_files(to) if name.endswith(OURS) and name not in files]
    done = api.create_commit(
        to,
        [*(CommitOperationAdd(name, content) for name, content in contents.items()),
         *(CommitOperationDelete(name) for name in stale)],
        commit_message=message,
    )  # fmt: skip
    return done.oid, sum(file.stat().st_size for file in files.values())
