"""The rows of a CSV or TSV file, one at a time. The first record, the header, names the columns.

Fields are quoted with " where they hold the delimiter, a line break or a quote, which is doubled (RFC 4180). A record
that can't be read is one bad row; reading continues at the next line.
"""

import csv
from collections.abc import Iterator
from typing import IO

from data_prep.reading.bad_row import BadRow, Fields, Row, not_utf8, too_long

DELIMITERS = {"csv": ",", "tsv": "\t"}
STEP = 1 << 20  # bytes that are read at once of a record that is skipped


def read_csv(stream: IO[bytes], kind: str, columns: list[str], max_bytes: int) -> Iterator[Row]:
    """Every record after the header, numbered from 1; a blank line is not a record.

    `columns` are the fields that are wanted, the text first. Any other field that is empty is None: CSV has no null.
    """
    records = _records(_Lines(stream, max_bytes), DELIMITERS[kind])
    header = next(records, [])
    twice = [] if isinstance(header, BadRow) else [name for name in columns if header.count(name) > 1]
    if twice:
        header = BadRow(f"two columns are named {twice[0]!r}; rename one")
    if isinstance(header, BadRow):
        yield 1, BadRow(f"nothing can be read because of the header: {header}", ends=True)
        return
    for row, values in enumerate(records, start=1):
        yield row, values if isinstance(values, BadRow) else _fields(header, values, columns[0])


def _fields(header: list[str], values: list[str], text_field: str) -> Fields | BadRow:
    if len(values) != len(header):
        has = f"{len(values)} field{'s' * (len(values) > 1)}"
        return BadRow(f"{has}, the header has {len(header)}; fix the row, or how its fields are quoted")
    named = zip(header, values, strict=True)
    return {name: value if value or name == text_field else None for name, value in named}


def _records(lines: "_Lines", delimiter: str) -> Iterator[list[str] | BadRow]:
    csv.field_size_limit(lines.max_bytes)  # no record that is longer is handed to the reader
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.begin_record()
        try:
            values = next(reader)
        except StopIteration:
            return
        except BadRow as problem:
            yield problem
        except csv.Error as error:
            reason = str(error).split(" - ")[0].replace("\t", "\\t")  # without Python's advice to programmers
            yield lines.problem or BadRow(f"not CSV ({reason}); fix how its fields are quoted")
        else:
            if values:
                yield lines.problem or values


class _Lines:
    """The lines of a file, for `csv.reader`, which asks for as many as the record has.

    Attributes:
        max_bytes: the most that a record may have.
        problem: what is wrong with the bytes of this record, if anything.
    """

    def __init__(self, stream: IO[bytes], max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._stream = stream
        self._encoding = "utf-8-sig"  # of the first line, which may begin with a byte order mark
        self.begin_record()

    def begin_record(self) -> None:
        """The next line is the first of a record."""
        self.problem: BadRow | None = None
        self._length = 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._stream.readline(self.max_bytes + 1 - self._length)
        if not line:
            raise StopIteration
        if self._length + len(line) > self.max_bytes:
            raise too_long(f"{self._skip_record(line):,}", self.max_bytes)
        before, encoding = self._length, self._encoding
        self._length, self._encoding = before + len(line), "utf-8"
        try:
            return line.decode(encoding)
        except UnicodeDecodeError as error:
            self.problem = self.problem or not_utf8(error, before)
            return line.decode(encoding, errors="replace")  # the reader still has to find the record's end

    def _skip_record(self, part: bytes) -> int:
        """Read up to the end of the record, of which `part` was read last; returns its length."""
        is_quoted = self._length > 0  # the reader asks for a further line within quotes only
        while part:
            self._length += len(part)
            is_quoted ^= part.count(b'"') % 2 == 1
            if part.endswith(b"\n") and not is_quoted:
                break
            part = self._stream.readline(STEP)
        return self._length
