"""`python -m data_prep inspect`: samples of shards as text, with their languages."""

from pathlib import Path

import numpy as np

from common.errors import UserError
from data_prep.prepare import plan_run
from data_prep.store import MANIFEST, TokenStore
from data_prep.tokenizer import decode
from pipeline.config.load import load_run

SEED = 17


def open_store(name: str, overrides: list[str]) -> TokenStore:
    """The store of a run, or in a folder.

    Raises:
        UserError: it is not there.
    """
    if Path(name).is_dir():
        return TokenStore(Path(name))
    folder = plan_run(load_run(name, overrides)).folder
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{name}: its tokens are not in {folder}; prepare them first: python -m data_prep {name}")
    return TokenStore(folder)


def inspect_store(store: TokenStore, only: str | None, num_samples: int, length: int) -> None:
    """Print what each set holds, and samples drawn over all of its shards.

    Raises:
        UserError: no set is named so.
    """
    if only is not None and only not in store.sets:
        raise UserError(f"--only {only}: no such set in {store.folder}; it holds {', '.join(store.sets)}")
    print(f"{store.folder}: {store.manifest.dtype} ids of {store.manifest.tokenizer}, a document ends in "
          f"{store.manifest.separator!r} ({store.separator_id})")  # fmt: skip
    for name, entry in store.sets.items():
        if only not in (None, name):
            continue
        part = "held out" if entry.train is None else "train"
        shards = store.held_out(name) if entry.train is None else store.train(name)
        counts = entry.train or entry.held_out
        print(f"\n{entry.group.upper()} {name}: language {entry.language}, {part}, {counts.documents:,} documents, "
              f"{counts.tokens:,} tokens, {max(1, len(entry.shards))} shards")  # fmt: skip
        size = min(length, counts.tokens)
        starts = np.random.default_rng(SEED).integers(0, counts.tokens - size + 1, num_samples)
        for start in sorted(starts.tolist()):
            text = decode(store.folder, shards.read(start, start + size).tolist())
            print(f"--- {name} [{entry.language}] tokens {start:,} to {start + size - 1:,}\n{text}")
