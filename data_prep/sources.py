"""Files of text to documents: one small reader a format, chosen by the file's suffix."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from pipeline.errors import UserError


@dataclass(frozen=True)
class Source:
    """Where a set's text lies and which fields of a row to read.

    `page_field` is the field by which documents are held out; None where no field is needed. With `page_required`
    a row without it is an error.
    """

    path: Path
    text_field: str = "text"
    page_field: str | None = None
    page_required: bool = True


@dataclass(frozen=True)
class Document:
    """One document. `row` counts from 1 in `file`; `page` is the value of the source's page field, if it has one."""

    text: str
    page: str | None
    file: Path
    row: int


def source_files(path: Path) -> list[Path]:
    """The files of a source: the file itself, or every file of a known format in a folder, in the order of names.

    Raises:
        UserError: nothing there, an unknown format, or an empty file.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and format_of(file) in READERS)
        if not files:
            raise UserError(f"{path}: no {_known_formats()} file in this folder; name another path")
    elif path.is_file():
        files = [path]
    else:
        raise UserError(f"{path}: does not exist; name a {_known_formats()} file or a folder of them")
    for file in files:
        if format_of(file) not in READERS:
            raise UserError(f"{file}: unknown format; {_known_formats()} can be read (and .gz of them)")
        if file.stat().st_size == 0:
            raise UserError(f"{file}: empty; put text into it or name another path")
    return files


def format_of(file: Path) -> str:
    """The suffix that says a file's format, without .gz: ".jsonl" for a.jsonl.gz."""
    name = file.with_suffix("") if file.suffix == ".gz" else file
    return name.suffix.lower()


def read_documents(source: Source) -> Iterator[Document]:
    """Every document of a source, in a fixed order.

    Raises:
        UserError: a file that can't be read or is not UTF-8, a row that is not JSON or lacks a field; it names the
            file and the row.
    """
    for file in source_files(source.path):
        try:
            with _open(file) as stream:
                for row, fields in READERS[format_of(file)](stream, file, source):
                    yield _document(fields, file, row, source)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{file}: can't be read ({error}); mend or replace the file") from error


def _open(file: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(file)) if file.suffix == ".gz" else open(file, "rb")


def _document(fields: dict[str, Any], file: Path, row: int, source: Source) -> Document:
    where = f"{file}, row {row}"
    text = fields.get(source.text_field)
    if not isinstance(text, str):
        problem = "no text field" if source.text_field not in fields else "not a string in the text field"
        has = ", ".join(map(str, fields)) or "no field"
        raise UserError(f"{where}: {problem} {source.text_field!r} (it has {has}); mend the row or set text_field")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{where}: holds half of a surrogate pair, which is not Unicode text; mend the row"
            ) from None
    page = fields.get(source.page_field) if source.page_field else None
    if source.page_field and source.page_required and (page is None or isinstance(page, (dict, list))):
        raise UserError(
            f"{where}: no value in the field {source.page_field!r}, which data.held_out.by names; "
            "add it to every row or set data.held_out.by=document"
        )
    return Document(text, None if page is None else str(page), file, row)


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 ({error.reason} at byte {error.start}); convert it to UTF-8") from error


def _read_jsonl(stream: IO[bytes], file: Path, source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
    for row, line in enumerate(stream, start=1):
        where = f"{file}, row {row}"
        text = _decode(line, where)
        if not text.strip():
            continue  # a line break at the end is no row
        try:
            fields = json.loads(text)
        except ValueError as error:
            raise UserError(f"{where}: not JSON ({error}); mend the row") from error
        if not isinstance(fields, dict):
            raise UserError(f'{where}: not a JSON object; write rows as {{"{source.text_field}": …}}')
        yield row, fields


def _read_text(stream: IO[bytes], file: Path, source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
    """The whole file is one document; its only field is the text."""
    yield 1, {source.text_field: _decode(stream.read(), f"{file}, row 1")}


Reader = Callable[[IO[bytes], Path, Source], Iterator[tuple[int, dict[str, Any]]]]
READERS: dict[str, Reader] = {".jsonl": _read_jsonl, ".txt": _read_text}


def _known_formats() -> str:
    return " or ".join(READERS)
