"""Run: pytest tests/data_prep/test_shards.py"""

from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from data_prep.shards import HEADER, Shard, ShardWriter, shard_paths

DOCUMENTS = {
    "uint16": [[0], [65535, 1, 2], [], [7] * 1000, [3, 0]],
    "int32": [[0], [2**31 - 1, 1, 2], [], [70_000] * 1000, [3, 0]],
}


def write(prefix: Path, dtype: str) -> Path:
    with ShardWriter(prefix, dtype) as writer:
        for document in DOCUMENTS[dtype]:
            writer.append(np.array(document, dtype=np.int64))
    return prefix


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_shard_gives_back_every_document(tmp_path: Path, dtype: str) -> None:
    shard = Shard(write(tmp_path / "a.b", dtype))
    assert [shard.document(i).tolist() for i in range(shard.num_documents)] == DOCUMENTS[dtype]
    assert shard.tokens.tolist() == [i for document in DOCUMENTS[dtype] for i in document]
    assert shard.lengths.tolist() == [len(document) for document in DOCUMENTS[dtype]]
    assert shard.num_tokens == sum(map(len, DOCUMENTS[dtype]))
    assert shard.tokens.dtype == np.dtype(dtype)
    assert isinstance(shard.tokens, np.memmap)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.b.bin", "a.b.idx"]


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_megatron_core_reads_the_same_documents(tmp_path: Path, dtype: str) -> None:
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    theirs = indexed_dataset.IndexedDataset(str(write(tmp_path / "shard", dtype)), mmap=True)
    assert theirs.index.dtype == np.dtype(dtype)
    assert theirs.document_indices.tolist() == list(range(len(DOCUMENTS[dtype]) + 1))
    assert [theirs[i].tolist() for i in range(len(theirs))] == DOCUMENTS[dtype]


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_a_shard_of_megatron_core_with_two_sequences_a_document_is_read(tmp_path: Path, dtype: str) -> None:
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    torch = pytest.importorskip("torch")
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.dtype(dtype).type)
    builder.add_item(torch.tensor([1, 2]))
    builder.add_item(torch.tensor([3]))
    builder.end_document()
    builder.add_item(torch.tensor([4, 5]))
    builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    shard = Shard(tmp_path / "theirs")
    assert [shard.document(i).tolist() for i in range(shard.num_documents)] == [[1, 2, 3], [4, 5]]


def test_ids_that_do_not_fit_are_refused_and_leave_no_file(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"ids 5\.\.65536 don't fit uint16"),
        ShardWriter(tmp_path / "a", "uint16") as w,
    ):
        w.append(np.array([5, 65536]))
    assert list(tmp_path.iterdir()) == []


def test_a_shard_without_documents_is_empty(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a", "uint16"):
        pass
    shard = Shard(tmp_path / "a")
    assert (shard.num_documents, shard.num_tokens) == (0, 0)
    with pytest.raises(IndexError, match="document 0 of 0"):
        shard.document(0)


@pytest.mark.parametrize("which", ["bin", "idx"])
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, which: str) -> None:
    path = dict(zip(("bin", "idx"), shard_paths(write(tmp_path / "a", "uint16")), strict=True))[which]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"a\.{which}: .*\d+ bytes where .* says \d+"):
        Shard(tmp_path / "a")


@pytest.mark.parametrize("which", ["bin", "idx"])
def test_a_missing_file_is_refused_by_name(tmp_path: Path, which: str) -> None:
    write(tmp_path / "a", "uint16").with_suffix(f".{which}").unlink()
    with pytest.raises(UserError, match=rf"a\.{which}: missing"):
        Shard(tmp_path / "a")


def test_a_foreign_index_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", "uint16").with_suffix(".idx").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(UserError, match=r"a\.idx: not an index of Megatron-core's format"):
        Shard(tmp_path / "a")


def test_deepspeeds_dtype_code_for_uint16_is_refused(tmp_path: Path) -> None:
    index = write(tmp_path / "a", "uint16").with_suffix(".idx")
    content = bytearray(index.read_bytes())
    content[17] = 6
    index.write_bytes(content)
    with pytest.raises(UserError, match="dtype code 6"):
        Shard(tmp_path / "a")


def test_an_index_whose_lengths_and_offsets_disagree_is_refused(tmp_path: Path) -> None:
    index = write(tmp_path / "a", "uint16").with_suffix(".idx")
    content = bytearray(index.read_bytes())
    content[HEADER.size] += 1
    index.write_bytes(content)
    with pytest.raises(UserError, match="contradict"):
        Shard(tmp_path / "a")
