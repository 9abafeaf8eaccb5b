"""Megatron-core reads what preparation writes. Run: pytest tests/data_prep/test_megatron.py"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.config import DataConfig
from tests.helpers.preparation import documents, prepare


@pytest.mark.parametrize(("vocab_size", "dtype"), [(300, "uint16"), (70_000, "int32")])
def test_megatron_core_reads_the_same_tokens_from_every_shard_of_a_store(
    two_languages: DataConfig, save_tokenizer: Any, tmp_path: Path, vocab_size: int, dtype: str
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset  # takes seconds

    data = two_languages.model_copy(update={"slice_bytes": 2000})
    store = prepare(data, save_tokenizer(), vocab_size, tmp_path / "cache", seed=17)
    for name in ("en", "el"):
        shards = store.train(name)
        assert len(shards.prefixes) > 2
        theirs = [IndexedDataset(str(prefix), mmap=True) for prefix in shards.prefixes]
        assert all(dataset.index.dtype == np.dtype(dtype) for dataset in theirs)
        found = [dataset[i].tolist() for dataset in theirs for i in range(len(dataset))]
        assert found == [ids.tolist() for ids in documents(shards)]
        assert shards.read(0, len(shards)).tolist() == [i for document in found for i in document]
        held_out = IndexedDataset(str(store.sets[name].folder / "held_out"), mmap=True)
        mine = store.held_out(name)
        assert [held_out[i].tolist() for i in range(len(held_out))] == [ids.tolist() for ids in documents(mine)]
