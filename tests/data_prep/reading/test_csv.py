"""CSV and TSV files to rows. Run: pytest tests/data_prep/reading/test_csv.py"""

import csv
import gzip
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_prep.reading.bad_row import BadRow
from data_prep.reading.file_splits import FileSplit
from data_prep.reading.rows import read_rows
from tests.data_prep.reading.test_sources import documents
from tests.helpers.preparation_jobs import ROOT


def rows_of(path: Path, max_bytes: int = 1000) -> list[tuple[int, Any]]:
    """Row numbers with the text, or with what is wrong."""
    split = FileSplit(str(path), "tsv" if ".tsv" in path.suffixes else "csv", 0, path.stat().st_size, 1, 1)
    rows = read_rows(split, ["text", "page"], "text", max_bytes)
    return [(row, str(fields) if isinstance(fields, BadRow) else fields["text"]) for row, fields in rows]


@pytest.fixture
def file(tmp_path: Path) -> Any:
    """file(content, name): a file with these bytes."""

    def write(content: bytes, name: str = "a.csv") -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return write


def test_quoted_fields_hold_line_breaks_delimiters_and_quotes(file: Any) -> None:
    content = '"text","page"\r\n"two\nlines\r\n\nand ""quotes"", commas",p\r\n\r\nδύο,"q"\r\n"",r'
    found = documents(file(content.encode()), page_field="page")
    assert [(d.text, d.page, d.row) for d in found] == [
        ('two\nlines\r\n\nand "quotes", commas', "p", 1),
        ("δύο", "q", 2),
        ("", "r", 3),
    ]


def test_whatever_pythons_writer_writes_is_read_back(tmp_path: Path) -> None:
    signs = ["a", '"', ",", "\t", "\n", "\r", "'", "é", "\ufeff", " "]
    texts = [signs[i] + signs[j] + signs[k] for i in range(10) for j in range(10) for k in range(10)]
    for name, dialect in (("a.csv", "excel"), ("b.tsv", "excel-tab"), ("c.csv", "unix")):
        with open(tmp_path / name, "w", encoding="utf-8", newline="") as stream:
            csv.writer(stream, dialect).writerows([["text", "page"], *([text, "p"] for text in texts)])
        assert rows_of(tmp_path / name) == list(enumerate(texts, start=1))


def test_a_byte_order_mark_belongs_to_no_column(file: Any) -> None:
    assert rows_of(file(b'\xef\xbb\xbf"text",page\none,p\n')) == [(1, "one")]


def test_a_row_without_a_page_is_named_and_an_empty_field_is_none(file: Any) -> None:
    path = file(b"text,page\none,p\ntwo,\n")
    with pytest.raises(Exception, match=r"a\.csv, row 2: no value in the field 'page'.*data\.held_out\.by=document"):
        documents(path, page_field="page")
    assert [d.page for d in documents(path, page_field="page", page_required=False)] == ["p", None]


@pytest.mark.parametrize("content", [b"\n\n", b"text,page\n", b"text,page"])
def test_a_file_of_no_rows_gives_none(file: Any, content: bytes) -> None:
    assert rows_of(file(content)) == []


def test_a_quote_within_an_unquoted_field_is_a_sign_like_others(file: Any) -> None:
    assert rows_of(file(b'text,page\n5" wide,p\nnext,p\n')) == [(1, '5" wide'), (2, "next")]


def test_reading_continues_at_the_line_after_a_bad_one(file: Any) -> None:
    path = file(b'text,page\n"never closed,p\n"two",p\nthree,p\n"' + b"x\n" * 600 + b'",p\nfive,p\n"no end,p\n')
    found = rows_of(path)
    assert [row for row, _ in found] == [1, 2, 3, 4, 5]
    assert found[0][1].startswith("not CSV (',' expected after '\"')")
    assert found[1] == (2, "three")
    assert found[2][1].startswith("1,205 bytes long, data.max_document_bytes is 1,000")
    assert found[3] == (4, "five")
    assert found[4][1].startswith("not CSV (unexpected end of data)")


def test_of_a_compressed_file_that_breaks_off_the_rows_before_are_read(file: Any) -> None:
    content = "text,page\n" + "".join(f'"{random.Random(n).random()}\n",p\n' for n in range(20_000))
    whole = gzip.compress(content.encode())
    found = rows_of(file(whole[: len(whole) // 2], "a.csv.gz"))
    assert len(found) > 5000
    assert [row for row, _ in found] == list(range(1, len(found) + 1))
    assert found[4999][1] == f"{random.Random(4999).random()}\n"
    assert found[-1][1].startswith("can't be read from here on")


def test_memory_does_not_grow_with_the_file_nor_with_a_field_that_has_no_end(tmp_path: Path) -> None:
    path = tmp_path / "big.csv"
    with open(path, "wb") as stream:
        stream.write(b"text,page\n" + b'"two\nlines",p\n' * 2_000_000)
        stream.write(b'"' + b"a line of a field without an end\n" * 1_000_000)
    program = f"""
import resource
from data_prep.reading.csv_rows import read_csv
with open({str(path)!r}, "rb") as stream:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for row, fields in read_csv(stream, "csv", ["text"], 1 << 20):
        pass
    print(row, fields, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT)
    row, *said, grown = done.stdout.split()
    assert int(row) == 2_000_001
    assert " ".join(said).startswith("33,000,001 bytes long")
    assert int(grown) < 10_000  # KB, of a file of 61 MB
