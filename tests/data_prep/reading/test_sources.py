"""Files to documents, in every format. Run: pytest tests/data_prep/reading/test_sources.py"""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from common.errors import UserError
from common.files import write_json
from data_prep.config import SourceConfig
from data_prep.reading.documents import BadRows, Document, Reading, read_documents
from data_prep.reading.file_splits import FileIndex, FileSplit, FileToIndex, index_file, pack
from data_prep.reading.sources import source_files, unread_line


def splits_of(path: Path | str, slice_bytes: int = 1 << 20, **fields: Any) -> list[FileSplit]:
    source = SourceConfig(path=str(path), **fields)
    found = []
    for file in source_files(source):
        asked = FileToIndex(str(file), source.text_field, source.text_unit, slice_bytes)
        index = Path(str(file) + ".index")
        write_json(index, index_file(asked))
        found += FileIndex.load(index).splits
        index.unlink()
    return found


def documents(path: Path | str, slice_bytes: int = 1 << 20, unit: str = "file", **reading: Any) -> list[Document]:
    found = []
    for part in pack(splits_of(path, slice_bytes, text_unit=unit), slice_bytes):
        found += read_documents(part, Reading(**reading), BadRows())
    return found


def read(path: Path | str, **reading: Any) -> list[tuple[str, str | None, int]]:
    return [(d.text, d.page, d.row) for d in documents(path, **reading)]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "page": "p"}\n\n{"text": "δύο", "page": 7}\n', encoding="utf-8")
    return path


MANY = [{"text": f"document {n} " + "ά" * (n % 23), "page": f"p{n // 3}", "other": n} for n in range(300)]


def write_many(folder: Path, kind: str) -> Path:
    """The same 300 rows in any format."""
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in MANY).encode()
    path = folder / f"many{kind}"
    table = pa.Table.from_pylist(MANY)
    if kind == ".jsonl":
        path.write_bytes(lines)
    elif kind == ".jsonl.gz":
        path.write_bytes(gzip.compress(lines))
    elif kind == ".jsonl.zst":
        half = len(lines) // 2  # two frames, as parallel compressors write
        path.write_bytes(b"".join(zstandard.compress(part) for part in (lines[:half], lines[half:])))
    elif kind in (".csv", ".tsv", ".csv.gz", ".tsv.zst"):
        out = io.StringIO()
        writer = csv.DictWriter(out, list(MANY[0]), delimiter="," if ".csv" in kind else "\t")
        writer.writeheader()
        writer.writerows(MANY)
        compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
        path.write_bytes(compress(out.getvalue().encode()))
    elif kind == ".parquet":
        pq.write_table(table, path, row_group_size=17)
    elif kind == ".arrow":
        with pa.ipc.new_file(str(path), table.schema) as arrow:
            arrow.write_table(table, max_chunksize=13)
    else:
        from datasets import Dataset

        Dataset.from_list(MANY).save_to_disk(str(path))
    return path


KINDS = [
    ".jsonl", ".jsonl.gz", ".jsonl.zst", ".csv", ".csv.gz", ".tsv", ".tsv.zst", ".parquet", ".arrow", ".saved"
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slice_bytes", [1, 700, 1 << 20])
def test_every_format_gives_every_row_once_with_its_number_however_it_is_sliced(
    tmp_path: Path, kind: str, slice_bytes: int
) -> None:
    found = documents(write_many(tmp_path / "x", kind), slice_bytes, page_field="page")
    assert [(d.text, d.page, d.row) for d in found] == [
        (row["text"], row["page"], number) for number, row in enumerate(MANY, start=1)
    ]


@pytest.mark.parametrize(
    ("kind", "several"),
    [(".jsonl", True), (".parquet", True), (".arrow", True), (".jsonl.gz", False), (".csv", False)],
)
def test_what_can_be_read_in_parts_is_cut(tmp_path: Path, kind: str, several: bool) -> None:
    splits = splits_of(write_many(tmp_path / "x", kind), 2000)
    assert (len(splits) > 3) is several


def test_a_cut_may_fall_anywhere_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    texts = ["x", "yy" * 40, "", "δ", "ω" * 9]
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    for slice_bytes in range(1, path.stat().st_size + 2):
        found = documents(path, slice_bytes)
        assert [(d.text, d.row) for d in found] == list(zip(texts, range(1, 6), strict=True)), slice_bytes


def test_small_neighbours_share_a_slice(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number:02d}.txt").write_text(f"text number {number}")
    slices = pack(splits_of(tmp_path), 100)
    assert 4 <= len(slices) <= 10
    assert [split.file for part in slices for split in part] == [str(tmp_path / f"{n:02d}.txt") for n in range(40)]


def test_jsonl_rows_keep_their_row_numbers_and_pages(rows: Path) -> None:
    assert read(rows) == [("one", None, 1), ("δύο", None, 3)]
    assert read(rows, page_field="page") == [("one", "p", 1), ("δύο", "7", 3)]


def test_a_folder_is_read_in_the_order_of_names_and_a_text_file_is_one_document(rows: Path, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("two\nlines\n", encoding="utf-8-sig")
    (tmp_path / "notes.md").write_text("not text for training")
    assert read(tmp_path) == [("one", None, 1), ("δύο", None, 3), ("two\nlines\n", None, 1)]


def test_files_of_an_unknown_format_in_a_folder_are_named_and_hidden_ones_and_those_of_datasets_are_not(
    rows: Path, tmp_path: Path
) -> None:
    for name in (".notes", ".git/HEAD", "state.json", "dataset_info.json", "cache-1.arrow", "b.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert unread_line(str(tmp_path)) is None
    for name in ("scan.pdf", "README.md", "more/notes.docx", "d.parquet.gz", "z"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    said = unread_line(str(tmp_path))
    assert said is not None and "\n" not in said
    assert said.startswith(
        f"{tmp_path}: 5 files are not read (README.md, d.parquet.gz, more/notes.docx and 2 more): "
        "their format is unknown; .jsonl, "
    )
    for path in (rows, tmp_path / "*.pdf", tmp_path / "nothing"):
        assert unread_line(str(path)) is None


def test_a_text_file_may_hold_a_document_a_line(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("one\n\nτρία\n", encoding="utf-8")
    assert read(tmp_path / "b.txt", unit="line") == [("one\n", None, 1), ("τρία\n", None, 3)]


def test_a_glob_names_files_at_any_depth(tmp_path: Path) -> None:
    for name in ("x/a.jsonl", "x/y/b.jsonl", "x/y/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    assert [text for text, _, _ in read(str(tmp_path / "x/**/*.jsonl"))] == ["x/a.jsonl", "x/y/b.jsonl"]
    with pytest.raises(UserError, match="no file matches"):
        read(str(tmp_path / "x/*.parquet"))


def test_another_text_field_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "x"}\n')
    assert read(path, text_field="content") == [("x", None, 1)]


def test_of_a_saved_dataset_of_several_splits_one_must_be_named(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    DatasetDict({"train": Dataset.from_list(MANY[:5]), "test": Dataset.from_list(MANY[5:])}).save_to_disk(
        str(tmp_path / "saved")
    )
    with pytest.raises(UserError, match=r"several splits; name one of them: .*\{test,train\}"):
        read(tmp_path / "saved")
    assert len(read(tmp_path / "saved" / "train")) == 5


def test_a_path_that_is_not_there_empty_or_unknown_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.jsonl: does not exist"):
        read(tmp_path / "nothing.jsonl")
    with pytest.raises(UserError, match=r"no \.jsonl, .* file in this folder"):
        read(tmp_path)
    for name, content, error in (("a.jsonl", b"", "empty"), ("a.docx", b"x", "unknown format")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}: {error}"):
            read(tmp_path / name)


@pytest.mark.parametrize("value", [None, ["p"]])
def test_a_row_without_a_usable_page_is_an_error_only_where_one_is_required(tmp_path: Path, value: object) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x", "page": "p"}) + "\n" + json.dumps({"text": "y", "page": value}) + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl, row 2: no value in the field 'page'.*data\.held_out\.by=document"):
        read(path, page_field="page")
    assert len(read(path, page_field="page", page_required=False)) == 2
