"""A run's held-out sets as tasks of lm-eval: a folder that any program of lm-eval's can be given."""

import json
from pathlib import Path

import yaml

from common.files import write_text
from data_prep.store import TokenStore
from data_prep.tokenizer import load_decoder
from pipeline.config.run import PROGRAM

GROUP = "held_out"
TEMPLATE = PROGRAM / "launch" / "tasks" / "held_out"
SHARED = ("_held_out_yaml", "held_out.py")
FORMAT = 1  # raised when the same text gives another task


def task_of_set(name: str) -> str:
    """What the task of a set is called."""
    return f"{GROUP}_{name}"


def version_of(text: str) -> str:
    """The version of a set's task, by the hash of its held-out text."""
    return f"{FORMAT}-{text}"


def write_held_out_tasks(store: TokenStore, texts: dict[str, str], folder: Path) -> None:
    """Write a task for each set, its documents, and the group of all; what is there already stays.

    Args:
        store: the tokens, of which the documents are decoded.
        texts: by set, a hash of its held-out text.
        folder: where they go.
    """
    for name in SHARED:
        _write(folder / name, (TEMPLATE / name).read_text(encoding="utf-8"))
    for name, text in texts.items():
        documents = folder / f"{name}.jsonl"
        task = yaml.safe_dump(
            {
                "include": SHARED[0],
                "task": task_of_set(name),
                "dataset_kwargs": {"file": documents.name},
                "metadata": {"version": version_of(text)},
            }
        )
        path = folder / f"{task_of_set(name)}.yaml"
        if not _holds(path, task) or not documents.is_file():
            write_text(documents, _documents(store, name))
            write_text(path, task)  # last: it says which text the documents are of
    members = [task_of_set(name) for name in texts]
    _write(folder / f"{GROUP}.yaml", yaml.safe_dump({"group": GROUP, "task": members}))
    for path in folder.glob(f"{task_of_set('*')}.yaml"):
        if path.stem not in members:
            path.unlink()  # of a set that the run no longer has


def _documents(store: TokenStore, name: str) -> str:
    """A line for each held-out document: its page, its text, and its size before it was tokenized."""
    shard, decode = store.held_out(name), load_decoder(store.sets[name].folder)
    first = 1 if store.begins_with_bos else 0
    rows = [
        {
            "page": known.page,
            "text": decode(shard.document(number)[first:-1].tolist()),
            "bytes": known.bytes,
            "characters": known.characters,
        }
        for number, known in enumerate(store.held_out_documents(name))
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


def _write(path: Path, text: str) -> None:
    if not _holds(path, text):
        write_text(path, text)
