"""Preparing text in tests: a tokenizer and the size of a vocabulary stand for a model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import LlamaConfig

from data_prep.config import DataConfig, ModelConfig, PreparationConfig, Stage1Tokens
from data_prep.prepare import plan_preparation
from data_prep.prepare import prepare as prepare_config
from data_prep.shards import Shard, ShardSequence
from data_prep.store import TokenStore


def config_of(
    data: DataConfig, tokenizer: str, vocab_size: int, cache_dir: Path, seed: int, stage1_tokens: int | None = None
) -> PreparationConfig:
    """Settings with a model of that vocabulary and that tokenizer."""
    model = Path(cache_dir).parent / f"model-{vocab_size}"
    LlamaConfig(vocab_size=vocab_size).save_pretrained(model)
    return PreparationConfig(
        model=ModelConfig(path=str(model)),
        data=data.model_copy(update={"tokenizer": tokenizer}),
        seed=seed,
        cache_dir=cache_dir,
        stage1=Stage1Tokens(tokens=stage1_tokens),
    )


def prepare(
    data: DataConfig,
    tokenizer: str,
    vocab_size: int,
    cache_dir: Path,
    seed: int,
    *,
    stage1_tokens: int | None = None,
    workers: int | None = None,
    keep: Mapping[str, str] | None = None,
) -> TokenStore:
    """The sets, prepared on this machine."""
    config = config_of(data, tokenizer, vocab_size, cache_dir, seed, stage1_tokens)
    store = prepare_config(config, "local", workers, planned=plan_preparation(config, keep=keep or {}))
    assert store is not None
    return store


def set_folders(cache: Path) -> list[Path]:
    """The folders of all finished sets in a cache."""
    return sorted(path for path in (cache / "tokens").glob("[!.]*") if path.is_dir())


def changed(data: DataConfig, **settings: object) -> DataConfig:
    """`data` with settings such as held_out__fraction=0.2 changed."""
    tree = data.model_dump()
    for key, value in settings.items():
        *parents, last = key.split("__")
        part = tree
        for parent in parents:
            part = part[parent]
        part[last] = value
    return DataConfig.model_validate(tree)


def stamps(store: TokenStore) -> dict[str, tuple[int, int]]:
    """Inode and time of change of every file of a store's sets."""
    files = [path for one in store.sets.values() for path in [one.folder, *one.folder.rglob("*")]]
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def cleaned(tree: dict[str, Any]) -> dict[str, Any]:
    """The same, with training text compared with held-out text."""
    return {**tree, "held_out": {"by": "page", "fraction": 0.1, "near_copy_threshold": 0.8}}


def documents(shards: Shard | ShardSequence) -> list[NDArray[np.integer]]:
    """The token ids of each document."""
    each = shards.shards() if isinstance(shards, ShardSequence) else [shards]
    return [shard.document(index) for shard in each for index in range(shard.num_documents)]
