"""A slice to its documents: every row checked, and each bad one an error, or counted and its place kept."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from common.errors import UserError
from data_prep.reading.bad_row import BadRow, Fields
from data_prep.reading.file_splits import FileSplit
from data_prep.reading.rows import read_rows

EXAMPLES = 10  # places per slice that are kept of each kind of loss


@dataclass(frozen=True)
class Document:
    """One document. `index` counts the rows of its slice from 0, bad ones too; `row` those of its file from 1.

    `page` is the value of the field that documents are held out by, if one is read.
    """

    text: str
    page: str | None
    file: str
    row: int
    index: int

    @property
    def place(self) -> str:
        """Where it stands, for people."""
        return f"{self.file}, row {self.row}"


@dataclass(frozen=True)
class Reading:
    """How a source's rows become documents. With `page_required` a row without the page field is bad."""

    text_field: str = "text"
    page_field: str | None = None
    page_required: bool = True
    max_bytes: int = 16 << 20
    skip_bad_rows: bool = False


@dataclass
class BadRows:
    """Bad rows that were skipped: how many, and what was wrong with the first of them."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """How many "rows", and the first "examples"."""
        return {"rows": self.count, "examples": self.examples}

    def add(self, what: str) -> None:
        """Count one."""
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(what)


def read_documents(splits: list[FileSplit], reading: Reading, bad_rows: BadRows) -> Iterator[Document]:
    """Every document of a slice, in order.

    Raises:
        UserError: a row can't be used, and bad rows are not skipped; it names the file, the row and the fix.
    """
    columns = [reading.text_field, *([reading.page_field] if reading.page_field else [])]
    index = 0
    for split in splits:
        for row, fields in read_rows(split, columns, reading.text_field, reading.max_bytes):
            made = fields if isinstance(fields, BadRow) else _document(fields, split.file, row, index, reading)
            index += 1
            if isinstance(made, Document):
                yield made
                continue
            what = f"{split.file}, row {row}: {made}"
            if not reading.skip_bad_rows:
                raise UserError(f"{what} (or set data.bad_rows=skip)")
            bad_rows.add(what)


def _document(fields: Fields, file: str, row: int, index: int, reading: Reading) -> Document | BadRow:
    text = fields.get(reading.text_field)
    if not isinstance(text, str):
        missing = reading.text_field not in fields
        problem = "no" if missing else "null in the" if text is None else "not a string in the"
        has = ", ".join(map(str, fields)) or "no field"
        return BadRow(f"{problem} text field {reading.text_field!r} (it has {has}); fix the row or set text_field")
    if "\0" in text:
        return BadRow(f"holds a NUL character, the {text.index(chr(0)) + 1}. of its text; remove it")
    if not text.isascii():
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            return BadRow("holds half of a surrogate pair, which is not Unicode text; fix the row")
    else:
        size = len(text)
    if size > reading.max_bytes:
        return BadRow(
            f"{size:,} bytes of text, data.max_document_bytes is {reading.max_bytes:,}; "
            "split the row or raise the setting"
        )
    page = fields.get(reading.page_field) if reading.page_field else None
    if reading.page_field and reading.page_required and (page is None or isinstance(page, (dict, list))):
        return BadRow(
            f"no value in the field {reading.page_field!r}, which data.held_out.by names; "
            "add it to every row or set data.held_out.by=document"
        )
    return Document(text, None if page is None else str(page), file, row, index)
