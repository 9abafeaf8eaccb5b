"""A split of a file to its rows, with a small reader per format. None of them ever holds a whole file."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import UserError
from data_prep.reading.bad_row import BadRow, Fields, Row, not_utf8, too_long
from data_prep.reading.csv_rows import read_csv
from data_prep.reading.file_splits import FileSplit, arrow_batches
from data_prep.reading.hub import read_hub
from data_prep.reading.sources import compression_of

BATCH_ROWS = 256


def read_rows(split: FileSplit, columns: list[str], text_field: str, max_bytes: int) -> Iterator[Row]:
    """Every row of a split in order; `columns` are the fields that are wanted, where only some can be read.

    A row that can't be read comes as a :class:`BadRow`; if it breaks off the file, it is the last.
    """
    path, row = Path(split.file), split.first_row - 1
    try:
        for row, fields in _rows(split, path, columns, text_field, max_bytes):
            yield row, fields
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"{path}: can't be read ({error.strerror}); fix or replace the file") from error
        reason = " ".join(str(error).split())[:160]
        yield row + 1, BadRow(f"can't be read from here on ({reason}); fix or replace the file", ends=True)


def _rows(split: FileSplit, path: Path, columns: list[str], text_field: str, max_bytes: int) -> Iterator[Row]:
    if split.format == "parquet":
        yield from _parquet(split, columns)
    elif split.format == "arrow":
        yield from _arrow(split, columns)
    elif split.format == "hub":
        yield from enumerate(read_hub(split.file, columns), start=1)
    elif split.format == "text":
        with _open(path) as stream:
            content = stream.read(max_bytes + 1)
            is_long = len(content) > max_bytes
            yield 1, too_long(f"over {max_bytes:,}", max_bytes) if is_long else _text(content, text_field)
    elif split.format in ("csv", "tsv"):
        with _open(path) as stream:
            yield from read_csv(stream, split.format, columns, max_bytes)
    else:
        read = _json if split.format == "jsonl" else _text
        with _open(path) as stream:
            stop = None if compression_of(path) else split.stop
            for row, line in _lines(stream, split, stop, max_bytes):
                if isinstance(line, BadRow):
                    yield row, line
                elif line.strip():  # a line break at the end is not a row
                    yield row, read(line, text_field)


def _open(path: Path) -> IO[bytes]:
    codec = {".gz": "gzip", ".zst": "zstd"}.get(compression_of(path))
    if codec is None:
        return open(path, "rb", buffering=1 << 20)
    stream: Any = pa.CompressedInputStream(pa.OSFile(str(path)), codec)
    return io.BufferedReader(stream)  # in small steps: what can be read before a file breaks off is read


def _lines(
    stream: IO[bytes], split: FileSplit, stop: int | None, max_bytes: int
) -> Iterator[tuple[int, bytes | BadRow]]:
    """Lines that begin in the split, with their numbers; of one that is too long, only its length is kept."""
    position = split.start
    if position:
        position -= 1  # a row that begins at the cut is the split's, so the byte before decides
        stream.seek(position)
        while (skipped := stream.readline(1 << 20)) and not skipped.endswith(b"\n"):
            position += len(skipped)
        position += len(skipped)
    row = split.first_row
    while stop is None or position < stop:
        line = stream.readline(max_bytes + 1)
        if not line:
            return
        position += len(line)
        if len(line) > max_bytes and not line.endswith(b"\n"):
            length = len(line)
            while (more := stream.readline(1 << 20)) and not more.endswith(b"\n"):
                length += len(more)
            length += len(more)
            position += length - len(line)
            yield row, too_long(f"{length:,}", max_bytes)
        else:
            yield row, line
        row += 1


def _decode(content: bytes) -> str | BadRow:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return not_utf8(error)


def _json(line: bytes, text_field: str) -> Fields | BadRow:
    text = _decode(line)
    if isinstance(text, BadRow):
        return text
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        nul = "it holds NUL bytes; " if "\0" in text else ""
        return BadRow(f"not JSON ({nul}{error}); fix the row")
    if not isinstance(fields, dict):
        return BadRow(f'not a JSON object; write rows as {{"{text_field}": …}}')
    return fields


def _text(content: bytes, text_field: str) -> Fields | BadRow:
    text = _decode(content)
    return text if isinstance(text, BadRow) else {text_field: text}


def _parquet(split: FileSplit, columns: list[str]) -> Iterator[Row]:
    with pq.ParquetFile(split.file, buffer_size=1 << 20) as file:
        known = [name for name in columns if name in file.schema_arrow.names] or file.schema_arrow.names[:1]
        row = split.first_row
        groups = range(split.start, split.stop)
        for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=known, use_threads=False):
            yield from _batch_rows(batch, row)
            row += batch.num_rows


def _arrow(split: FileSplit, columns: list[str]) -> Iterator[Row]:
    row = split.first_row
    for batch in arrow_batches(Path(split.file), split.start, split.stop):
        known = [name for name in columns if name in batch.schema.names] or batch.schema.names[:1]
        for start in range(0, batch.num_rows, BATCH_ROWS):
            part = batch.select(known).slice(start, BATCH_ROWS)
            yield from _batch_rows(part, row)
            row += part.num_rows


def _batch_rows(batch: pa.RecordBatch, first_row: int) -> Iterator[Row]:
    try:
        rows: list[Fields | BadRow] = batch.to_pylist()
    except UnicodeDecodeError:
        rows = [_one_row(batch, number) for number in range(batch.num_rows)]
    yield from enumerate(rows, start=first_row)


def _one_row(batch: pa.RecordBatch, number: int) -> Fields | BadRow:
    try:
        return cast(Fields, batch.slice(number, 1).to_pylist()[0])
    except UnicodeDecodeError as error:
        return not_utf8(error)
