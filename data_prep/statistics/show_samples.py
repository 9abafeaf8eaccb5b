"""`python -m data_prep inspect`: samples of shards as text, with their languages."""

from pathlib import Path

import numpy as np

from common.errors import UserError
from common.settings import load_settings
from data_prep.config import PreparationConfig
from data_prep.prepare import plan_preparation
from data_prep.store import TokenSet, TokenStore
from data_prep.tokenizer import load_decoder

SEED = 17


def open_sets(name: str, overrides: list[str]) -> dict[str, TokenSet]:
    """The sets of a run by what is shown of them, such as "NEW el, language el"; or the one in a folder.

    Raises:
        UserError: they are not there.
    """
    if Path(name).is_dir():
        return {Path(name).name: TokenSet(Path(name))}
    config = load_settings(PreparationConfig, name, overrides)
    planned = plan_preparation(config)
    if not planned.is_prepared:
        raise UserError(f"{name}: not all its sets are in {planned.tokens}; prepare them: python -m data_prep {name}")
    store = TokenStore(planned.tokens, config.data, planned.keys)
    return {
        f"{config.data.group(set_name).upper()} {set_name}, language {config.data.sets[set_name].language}": one
        for set_name, one in store.sets.items()
    }


def inspect_sets(sets: dict[str, TokenSet], only: str | None, num_samples: int, length: int) -> None:
    """Print what each set holds, and samples drawn over all of its shards.

    Raises:
        UserError: no set is named so.
    """
    names = {title.split(",")[0].split(" ")[-1]: title for title in sets}
    if only is not None and only not in names:
        raise UserError(f"--only {only}: no such set; there are {', '.join(names)}")
    for title in names.values() if only is None else [names[only]]:
        one = sets[title]
        manifest = one.manifest
        shards = one.held_out() if manifest.train is None else one.train()
        counts = manifest.train or manifest.held_out
        part = "held out" if manifest.train is None else "train"
        print(
            f"{title}: {part}, {counts.documents:,} documents, {counts.tokens:,} tokens, "
            f"{max(1, len(manifest.shards))} shards of {manifest.dtype} ids of {manifest.tokenizer}, "
            f"a document ends in {manifest.separator!r} ({manifest.separator_id})"
        )
        size = min(length, counts.tokens)
        starts = np.random.default_rng(SEED).integers(0, counts.tokens - size + 1, num_samples)
        decode = load_decoder(one.folder)
        for start in sorted(starts.tolist()):
            text = decode(shards.read(start, start + size).tolist())
            print(f"--- {title}, tokens {start:,} to {start + size - 1:,}\n{text}")
