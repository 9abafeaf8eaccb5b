"""Run: pytest tests/data_prep/test_sources.py"""

import gzip
import json
from pathlib import Path

import pytest

from data_prep.sources import Source, read_documents
from pipeline.errors import UserError


def read(path: Path, **fields: object) -> list[tuple[str, str | None, int]]:
    return [(d.text, d.page, d.row) for d in read_documents(Source(path, **fields))]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "page": "p"}\n\n{"text": "δύο", "page": 7}\n', encoding="utf-8")
    return path


def test_jsonl_rows_keep_their_row_numbers_and_pages(rows: Path) -> None:
    assert read(rows) == [("one", None, 1), ("δύο", None, 3)]
    assert read(rows, page_field="page") == [("one", "p", 1), ("δύο", "7", 3)]


def test_gzipped_jsonl_reads_as_the_plain_file(rows: Path) -> None:
    zipped = rows.with_name("b.jsonl.gz")
    zipped.write_bytes(gzip.compress(rows.read_bytes()))
    assert read(zipped, page_field="page") == read(rows, page_field="page")


def test_a_folder_is_read_in_the_order_of_names_and_a_text_file_is_one_document(rows: Path, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("two\nlines\n", encoding="utf-8-sig")
    (tmp_path / "notes.md").write_text("not text for training")
    assert read(tmp_path) == [("one", None, 1), ("δύο", None, 3), ("two\nlines\n", None, 1)]


def test_another_text_field_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "x"}\n')
    assert read(path, text_field="content") == [("x", None, 1)]


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.jsonl: does not exist"):
        read(tmp_path / "nothing.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("a.jsonl", b"", r"a\.jsonl: empty"),
        ("a.parquet", b"PAR1", r"a\.parquet: unknown format"),
        ("a.jsonl", '{"text": "ü"}'.encode("latin-1"), r"a\.jsonl, row 1: not UTF-8"),
        ("a.txt", "ü".encode("latin-1"), r"a\.txt, row 1: not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl, row 2: not JSON"),
        ("a.jsonl", b'["x"]\n', r"a\.jsonl, row 1: not a JSON object"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"content": "x", "id": 1}\n',
            r"row 2: no text field 'text' \(it has content, id\)",
        ),
        ("a.jsonl", b'{"text": 5}\n', r"row 1: not a string in the text field 'text'"),
        ("a.jsonl", b'{"text": "\\ud83d"}\n', r"row 1: holds half of a surrogate pair"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99)[:-9], r"a\.jsonl\.gz: can't be read"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz: can't be read"),
    ],
)
def test_an_error_names_file_and_row(tmp_path: Path, name: str, content: bytes, error: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=error) as raised:
        read(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \.jsonl or \.txt file in this folder"):
        read(tmp_path)


@pytest.mark.parametrize("value", [None, ["p"]])
def test_a_row_without_a_usable_page_is_an_error_only_where_one_is_required(tmp_path: Path, value: object) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x", "page": "p"}) + "\n" + json.dumps({"text": "y", "page": value}) + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl, row 2: no value in the field 'page'.*data\.held_out\.by=document"):
        read(path, page_field="page")
    assert len(read(path, page_field="page", page_required=False)) == 2
