"""Token shards in Megatron-core's indexed format: PREFIX.bin holds flat token ids, PREFIX.idx where documents begin.

Layout of .idx, little-endian: magic (9 bytes), version 1 (uint64), dtype code (uint8), number of sequences S (uint64),
number of document bounds D + 1 (uint64), then lengths in tokens (int32, S), byte offsets (int64, S) and document
bounds as sequence numbers (int64, D + 1). We write one sequence per document and read any number.
"""

import hashlib
import os
import platform
import struct
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from common.files import fsync_path

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype[Any]] = {
    8: np.dtype("<u2"),
    4: np.dtype("<i4"),
}  # megatron-core's codes for uint16 and int32
CODES = {dtype: code for code, dtype in DTYPES.items()}


def shard_paths(prefix: Path) -> tuple[Path, Path]:
    """The .bin and .idx of a shard (a prefix may itself contain dots)."""
    return prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")


class ShardWriter:
    """Streams documents into a shard; a context manager.

    The files take their names when the block ends without an error, .idx last: a shard with an .idx is whole.
    `dtype` is "uint16" or "int32".
    """

    def __init__(self, prefix: Path, dtype: str) -> None:
        self._dtype = np.dtype(dtype).newbyteorder("<")
        assert self._dtype in CODES, f"no shard dtype {dtype}"
        self._final = shard_paths(prefix)
        self._temporary = tuple(
            path.with_name(f".{path.name}.tmp{platform.node()}-{os.getpid()}") for path in self._final
        )
        self._lengths: list[int] = []
        self._digest = hashlib.sha256()
        self._sha256: dict[str, str] = {}
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._temporary[0], "wb")  # noqa: SIM115 - closed in __exit__

    def __enter__(self) -> Self:
        return self

    def append(self, ids: NDArray[np.integer]) -> None:
        """Write one document's token ids (1-D, any integer dtype).

        Raises:
            ValueError: an id does not fit the shard's dtype.
        """
        if ids.dtype != self._dtype:
            limit = np.iinfo(self._dtype)
            if ids.size and (ids.min() < 0 or ids.max() > limit.max):
                raise ValueError(
                    f"document {len(self._lengths)}: ids {ids.min()}..{ids.max()} don't fit {self._dtype.name}"
                )
            ids = ids.astype(self._dtype)
        content = ids.tobytes()
        self._digest.update(content)
        self._file.write(content)
        self._lengths.append(ids.size)

    @property
    def sha256(self) -> dict[str, str]:
        """The hex sha256 of .bin and .idx by suffix, once the block has ended without an error."""
        return self._sha256

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
        except OSError:  # a full disk may show only now
            if kind is None:
                for path in self._temporary:
                    path.unlink(missing_ok=True)
                raise
        if kind is not None:
            for path in self._temporary:
                path.unlink(missing_ok=True)
            return
        index = self._index()
        try:
            self._temporary[1].write_bytes(index)
            for temporary, final in zip(self._temporary, self._final, strict=True):
                fsync_path(temporary)
                os.replace(temporary, final)
        except BaseException:
            for path in self._temporary:
                path.unlink(missing_ok=True)
            raise
        fsync_path(self._final[0].parent)
        self._sha256 = {".bin": self._digest.hexdigest(), ".idx": hashlib.sha256(index).hexdigest()}

    def _index(self) -> bytes:
        lengths = np.asarray(self._lengths, dtype="<i4")
        ends = np.cumsum(lengths, dtype="<i8") * self._dtype.itemsize
        offsets = np.concatenate([np.zeros(1, "<i8"), ends])[:-1].astype("<i8")
        bounds = np.arange(len(lengths) + 1, dtype="<i8")
        header = HEADER.pack(MAGIC, VERSION, CODES[self._dtype], len(lengths), len(bounds))
        return header + lengths.tobytes() + offsets.tobytes() + bounds.tobytes()


class Shard:
    """A memory-mapped shard.

    Attributes:
        tokens: all token ids in order, (num_tokens,), uint16 or int32, read-only.
        offsets: where each document begins in `tokens`, and the end: (num_documents + 1,) int64.

    Raises:
        UserError: a file is missing, truncated, or not of this format.
    """

    def __init__(self, prefix: Path) -> None:
        bin_path, idx_path = shard_paths(Path(prefix))
        for path in (bin_path, idx_path):
            if not path.is_file():
                raise UserError(f"{path}: missing; delete its folder and run tokenize again")
        dtype, self.offsets = _read_index(idx_path)
        expected = int(self.offsets[-1]) * dtype.itemsize
        if (found := bin_path.stat().st_size) != expected:
            raise UserError(
                f"{bin_path}: {found} bytes where its .idx says {expected}; delete its folder and run tokenize again"
            )
        # An empty file can't be mapped.
        self.tokens: NDArray[np.integer] = np.memmap(bin_path, dtype, "r") if expected else np.empty(0, dtype)

    @property
    def num_documents(self) -> int:
        """How many documents there are."""
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        """How many token ids there are, separators included."""
        return len(self.tokens)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Token ids of each document: (num_documents,)."""
        return np.diff(self.offsets)

    def read(self, start: int, stop: int) -> NDArray[np.integer]:
        """Tokens `start` to `stop - 1`: a view of the mapped file, (stop - start,)."""
        return self.tokens[start:stop]

    def document(self, index: int) -> NDArray[np.integer]:
        """Token ids of one document, counted from 0: a view of the mapped file, (length,)."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


class ShardSequence:
    """Shards one after the other, as one run of tokens and documents. A shard is opened when it is first read."""

    def __init__(self, prefixes: list[Path], dtype: str) -> None:
        """Look at every shard's size.

        Raises:
            UserError: a file is missing.
        """
        self.prefixes, self.dtype = prefixes, np.dtype(dtype).newbyteorder("<")
        sizes = [_size(shard_paths(prefix)[0]) // self.dtype.itemsize for prefix in prefixes]
        self.starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])
        self._bounds = self.starts.tolist()
        self._tokens: list[NDArray[np.integer] | None] = [None] * len(prefixes)

    def __len__(self) -> int:
        return self.num_tokens

    @property
    def num_tokens(self) -> int:
        """How many token ids there are, separators included."""
        return int(self._bounds[-1])

    @property
    def num_documents(self) -> int:
        """How many documents there are."""
        return sum(shard.num_documents for shard in self.shards())

    def shards(self) -> Iterator[Shard]:
        """Each shard, opened and its index checked."""
        for prefix in self.prefixes:
            yield Shard(prefix)

    def read(self, start: int, stop: int) -> NDArray[np.integer]:
        """Tokens `start` to `stop - 1`, (stop - start,); a view of the mapped file where one shard holds them all."""
        number = bisect_right(self._bounds, start) - 1
        begin = start - self._bounds[number]
        tokens = self._tokens[number] if 0 <= number < len(self._tokens) else None
        if tokens is None:
            tokens = self._open(number)
        found = tokens[begin : begin + stop - start]
        if len(found) == stop - start:
            return found
        assert 0 <= start <= stop <= self.num_tokens, f"tokens {start} to {stop} of {self.num_tokens}"
        return np.concatenate([found, self.read(start + len(found), stop)])

    def _open(self, number: int) -> NDArray[np.integer]:
        path = shard_paths(self.prefixes[number])[0]
        size = self._bounds[number + 1] - self._bounds[number]
        # A plain array over the mapped file: slices of np.memmap itself cost several times as much.
        tokens = np.asarray(np.memmap(path, self.dtype, "r")) if size else np.empty(0, self.dtype)
        self._tokens[number] = tokens
        return tokens


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: missing; delete its folder and run tokenize again") from error


def _read_index(path: Path) -> tuple[np.dtype[Any], NDArray[np.int64]]:
    """The dtype of a shard and its documents' offsets in tokens, (num_documents + 1,), every bound checked."""
    content = path.read_bytes()
    fix = "delete its folder and run tokenize again"
    if len(content) < HEADER.size or not content.startswith(MAGIC):
        raise UserError(f"{path}: not an index of Megatron-core's format; {fix}")
    _, version, code, num_sequences, num_bounds = HEADER.unpack_from(content)
    if version != VERSION or code not in DTYPES:
        raise UserError(
            f"{path}: version {version} with dtype code {code}; only uint16 (8) and int32 (4) are read; {fix}"
        )
    expected = HEADER.size + num_sequences * (4 + 8) + num_bounds * 8
    if len(content) != expected:
        raise UserError(f"{path}: has {len(content)} bytes where its header says {expected}; {fix}")
    lengths = np.frombuffer(content, "<i4", num_sequences, HEADER.size)
    starts = np.frombuffer(content, "<i8", num_sequences, HEADER.size + 4 * num_sequences)
    bounds = np.frombuffer(content, "<i8", num_bounds, HEADER.size + 12 * num_sequences)
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    contiguous = (lengths >= 0).all() and (starts == ends[:-1] * DTYPES[code].itemsize).all()
    covering = num_bounds > 0 and bounds[0] == 0 and bounds[-1] == num_sequences and (np.diff(bounds) >= 0).all()
    if not (contiguous and covering):
        raise UserError(f"{path}: its lengths and offsets contradict each other; {fix}")
    return DTYPES[code], ends[bounds]
