"""A source's files cut into slices: what one task reads. Slices depend on files and settings only.

A plain text file is cut into byte ranges (a row belongs to the range that its first byte lies in), a parquet file
into runs of row groups, an arrow file into runs of record batches. A compressed file can be read from its start only,
and so can a CSV file, whose quoted fields may hold line breaks: each is one split. Small neighbours share a slice.
Each file is read once for its hash and for the row number at every cut, so that a task can name rows without reading
what lies before.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import UserError
from common.files import content_key, read_json
from data_prep.reading.sources import Format, compression_of, format_of

INDEX_FORMAT = 2  # raise it when a file's index has another form
BLOCK = 4 << 20
COMPRESSED_TEXT = 4  # how many times its size a compressed file holds, for balance alone


@dataclass(frozen=True)
class FileSplit:
    """A part of one file: bytes `start` to `stop` of plain text, else row groups, record batches, or all.

    `first_row` counts the file's rows from 1; `size` is about its bytes of text. Of a hub dataset, `file` names
    one of its data files, which is read whole.
    """

    file: str
    format: Format
    start: int
    stop: int
    first_row: int
    size: int


@dataclass(frozen=True)
class FileIndex:
    """A file's bytes, hash and splits."""

    sha256: str
    bytes: int
    splits: list[FileSplit]

    @classmethod
    def load(cls, path: Path) -> "FileIndex":
        """Read what `index_file` wrote."""
        value = read_json(path)
        return cls(value["sha256"], value["bytes"], [FileSplit(**split) for split in value["splits"]])


@dataclass(frozen=True)
class FileToIndex:
    """A file with what its cuts depend on."""

    path: str
    text_field: str
    text_unit: str
    slice_bytes: int

    def index_path(self, folder: Path) -> Path:
        """Where the index of this very file (by name, size and time of change) is kept."""
        status = Path(self.path).stat()
        stamp = [str(Path(self.path).resolve()), status.st_size, status.st_mtime_ns]
        asked = [INDEX_FORMAT, self.path, stamp, self.text_field, self.text_unit, self.slice_bytes]
        return folder / f"{content_key(asked)}.json"


def index_file(file: FileToIndex) -> dict[str, Any]:
    """Hash and cut a file: "sha256", "bytes", and "splits" (the fields of each); `FileIndex.load` reads them.

    Raises:
        UserError: it can't be read.
    """
    path = Path(file.path)
    kind = format_of(path, file.text_unit)
    assert kind is not None
    size = path.stat().st_size
    try:
        if kind in ("jsonl", "lines") and not compression_of(path):
            sha256, splits = _cut_text(path, kind, size, file.slice_bytes)
        else:
            with open(path, "rb") as stream:
                sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            about = size * COMPRESSED_TEXT if compression_of(path) else size
            splits = _cut_table(path, kind, file) or [FileSplit(file.path, kind, 0, size, 1, about)]
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); fix or replace the file") from error
    return {"sha256": sha256, "bytes": size, "splits": [asdict(split) for split in splits]}


def _cut_table(path: Path, kind: Format, file: FileToIndex) -> list[FileSplit]:
    """The splits of a parquet or arrow file; none of one that is damaged, which reading it will say."""
    try:
        if kind == "parquet":
            return _cut_parquet(path, file.text_field, file.slice_bytes)
        return _cut_arrow(path, file.slice_bytes) if kind == "arrow" else []
    except pa.ArrowException:
        return []


def _cut_text(path: Path, kind: Format, size: int, slice_bytes: int) -> tuple[str, list[FileSplit]]:
    """The hash, and byte ranges of equal length with the number of the first row that begins in each."""
    digest = hashlib.sha256()
    cuts = list(range(0, size, slice_bytes))
    # The number of rows that begin before a cut is 1 + the line breaks before the byte in front of it.
    newlines_before: list[int] = []
    newlines = position = 0
    with open(path, "rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
            while len(newlines_before) < len(cuts) and cuts[len(newlines_before)] - 1 <= position + len(block):
                cut = max(0, cuts[len(newlines_before)] - 1)
                newlines_before.append(newlines + block.count(b"\n", 0, cut - position))
            newlines += block.count(b"\n")
            position += len(block)
    rows = [1, *(2 + count for count in newlines_before[1:])]
    stops = [*cuts[1:], size]
    return digest.hexdigest(), [
        FileSplit(str(path), kind, cut, stop, row, stop - cut)
        for cut, stop, row in zip(cuts, stops, rows, strict=True)
    ]


def _cut_parquet(path: Path, text_field: str, slice_bytes: int) -> list[FileSplit]:
    metadata = pq.ParquetFile(path).metadata
    sizes, rows = [], []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        columns = [group.column(i) for i in range(group.num_columns)]
        text = [c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] == text_field]
        sizes.append(sum(text) or group.total_byte_size)
        rows.append(group.num_rows)
    return _runs(str(path), "parquet", sizes, rows, slice_bytes)


def _cut_arrow(path: Path, slice_bytes: int) -> list[FileSplit]:
    sizes, rows = [], []
    for batch in arrow_batches(path):
        sizes.append(batch.nbytes)
        rows.append(batch.num_rows)
    return _runs(str(path), "arrow", sizes, rows, slice_bytes)


def arrow_batches(path: Path, start: int = 0, stop: int | None = None) -> Iterator[pa.RecordBatch]:
    """Record batches of an arrow file (either of its two forms), mapped, not read."""
    source = pa.memory_map(str(path))
    try:
        reader: Any = pa.ipc.open_file(source)
        numbers = range(start, reader.num_record_batches if stop is None else stop)
        yield from (reader.get_batch(number) for number in numbers)
    except pa.ArrowInvalid:
        source.seek(0)
        for number, batch in enumerate(pa.ipc.open_stream(source)):
            if stop is not None and number >= stop:
                return
            if number >= start:
                yield batch


def _runs(file: str, kind: Format, sizes: list[int], rows: list[int], slice_bytes: int) -> list[FileSplit]:
    """Neighbouring row groups or batches, as many as make a slice."""
    splits: list[FileSplit] = []
    start, size, first_row, row = 0, 0, 1, 1
    for number, (group_size, group_rows) in enumerate(zip(sizes, rows, strict=True)):
        size += group_size
        row += group_rows
        if size >= slice_bytes or number == len(sizes) - 1:
            splits.append(FileSplit(file, kind, start, number + 1, first_row, size))
            start, size, first_row = number + 1, 0, row
    return splits


def hub_split(name: str, size: int | None, slice_bytes: int) -> FileSplit:
    """A data file of a hub dataset, of so many (compressed) bytes where that is known."""
    return FileSplit(name, "hub", 0, 1, 1, slice_bytes if size is None else size * COMPRESSED_TEXT)


def pack(splits: list[FileSplit], slice_bytes: int) -> list[list[FileSplit]]:
    """Neighbours that together are about a slice, such as many small files."""
    slices: list[list[FileSplit]] = []
    size = slice_bytes
    for split in splits:
        if size + split.size > slice_bytes:
            slices.append([])
            size = 0
        slices[-1].append(split)
        size += split.size
    return slices
