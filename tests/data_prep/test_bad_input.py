"""What is wrong with a source: one line that names file and row, or counted and skipped as the run says.

Run: pytest tests/data_prep/test_bad_input.py
"""

import gzip
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from transformers import LlamaConfig

from common.errors import UserError
from data_prep.config import DataConfig
from data_prep.store import TokenSet
from tests.data_prep.conftest import pages
from tests.helpers.preparation import prepare, set_folders
from tests.helpers.preparation_jobs import ROOT

GOOD = [row["text"] for row in pages("el", 40)]


def lines(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({field: text}, ensure_ascii=False) + "\n" for text in texts).encode()


def jsonl(bad: bytes) -> Callable[[Path], Path]:
    """20 good rows, a bad one, 20 good rows."""

    def write(folder: Path) -> Path:
        path = folder / "el.jsonl"
        path.write_bytes(lines(GOOD[:20]) + bad + lines(GOOD[20:]))
        return path

    return write


def table(bad: bytes, kind: str = "csv") -> Callable[[Path], Path]:
    """The same with a column of numbers, in CSV or TSV."""

    def write(folder: Path) -> Path:
        path = folder / f"el.{kind}"
        mark = b"\t" if kind == "tsv" else b","
        rows = [text.encode() + mark + b"%d\n" % number for number, text in enumerate(GOOD)]
        path.write_bytes(b"text" + mark + b"n\n" + b"".join([*rows[:20], bad, *rows[20:]]))
        return path

    return write


def truncated(suffix: str) -> Callable[[Path], Path]:
    """A compressed file that breaks off in the middle: the text repeats nothing, so that much of it is lost."""

    def write(folder: Path) -> Path:
        texts = [*GOOD, *(f"{hash_of(n)} {hash_of(n + 7000)}" for n in range(4000))]
        compress = gzip.compress if suffix == ".gz" else zstandard.compress
        content = compress(lines(texts))
        path = folder / f"el.jsonl{suffix}"
        path.write_bytes(content[: len(content) // 2])
        return path

    return write


def hash_of(number: int) -> str:
    import hashlib

    return hashlib.sha256(str(number).encode()).hexdigest()


def parquet(texts: list[Any], field: str = "text", cut: int = 0) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "el.parquet"
        kind = pa.binary() if any(isinstance(text, bytes) for text in texts) else None
        pq.write_table(pa.table({field: pa.array(texts, kind)}), path)
        if kind is not None:  # bytes that are not UTF-8, in a column that says they are
            table = pq.read_table(path)
            buffers = table[field].combine_chunks().buffers()
            text = pa.StringArray.from_buffers(len(texts), buffers[1], buffers[2])
            pq.write_table(pa.table({field: text}), path)
        if cut:
            path.write_bytes(path.read_bytes()[:-cut])
        return path

    return write


# (what is wrong, the file, what the line must say, rows that are lost where they are skipped)
ROWS: list[tuple[str, Callable[[Path], Path], list[str], int]] = [
    ("broken JSON", jsonl(b'{"text": \n'), ["el.jsonl, row 21", "not JSON"], 1),
    ("a row that is not an object", jsonl(b'["x"]\n'), ["el.jsonl, row 21", "not a JSON object"], 1),
    ("a missing field", jsonl(b'{"content": "x", "id": 1}\n'), ["row 21", "no text field 'text'", "it has content, id"], 1),
    ("a null field", jsonl(b'{"text": null}\n'), ["row 21", "null in the text field 'text'"], 1),
    ("not a string", jsonl(b'{"text": 5}\n'), ["row 21", "not a string in the text field 'text'"], 1),
    ("invalid UTF-8", jsonl(b'{"text": "\xff\xfe"}\n'), ["row 21", "not UTF-8", "at byte 10"], 1),
    ("half a surrogate pair", jsonl(b'{"text": "\\ud83d"}\n'), ["row 21", "half of a surrogate pair"], 1),
    ("an escaped NUL", jsonl(b'{"text": "a\\u0000b"}\n'), ["row 21", "NUL character, the 2."], 1),
    ("NUL bytes", jsonl(b'{"text": "a\x00b"}\n'), ["row 21", "not JSON", "NUL bytes"], 1),
    ("a single line of 50 MB", jsonl(b'{"text": "' + b"x" * 50_000_000 + b'"}\n'), ["row 21", "50,000,013 bytes long", "data.max_document_bytes"], 1),
    ("truncated gzip", truncated(".gz"), ["el.jsonl.gz, row ", "can't be read from here on"], 1),
    ("truncated zst", truncated(".zst"), ["el.jsonl.zst, row ", "can't be read from here on"], 1),
    ("a CSV row with a field too many", table(b"a, b,1\n"), ["el.csv, row 21", "3 fields, the header has 2"], 1),
    ("a CSV row with a field too few", table(b"a\n"), ["el.csv, row 21", "1 field, the header has 2"], 1),
    ("CSV text that is not UTF-8", table(b'"two\nlines \xff",1\n'), ["el.csv, row 21", "not UTF-8", "at byte 11"], 1),
    ("a CSV NUL", table(b"a\x00b,1\n"), ["el.csv, row 21", "NUL character, the 2."], 1),
    ("a CSV field of 50 MB", table(b"x" * 50_000_000 + b",1\n"), ["el.csv, row 21", "50,000,003 bytes long", "data.max_document_bytes"], 1),
    ("a CSV field of 24 MB in short lines", table(b'"' + b'a ""quote""\n' * 2_000_000 + b'",1\n'), ["el.csv, row 21", "24,000,005 bytes long", "data.max_document_bytes"], 1),
    ("a CSV quote that is not doubled", table(b'"a" b,1\n'), ["el.csv, row 21", "not CSV (',' expected after '\"')", "fix how its fields are quoted"], 1),
    ("a carriage return in CSV", table(b"a\rb,1\n"), ["el.csv, row 21", "not CSV (new-line character seen in unquoted field)"], 1),
    ("a TSV quote that is not doubled", table(b'"a" b\t1\n', "tsv"), ["el.tsv, row 21", "not CSV ('\\t' expected after '\"')"], 1),
    ("a CSV column that is missing", lambda folder: (folder / "el.csv").write_bytes(b"content,n\n" + b"x,1\n" * 40) and folder / "el.csv", ["el.csv, row 1", "no text field 'text'", "it has content, n"], 40),
    ("a CSV column that is named twice", lambda folder: (folder / "el.csv").write_bytes(b"text,text\nx,y\n") and folder / "el.csv", ["el.csv, row 1", "because of the header: two columns are named 'text'"], 1),
    ("CSV in UTF-16", lambda folder: (folder / "el.csv").write_bytes("text,n\nx,1\n".encode("utf-16")) and folder / "el.csv", ["el.csv, row 1", "because of the header: not UTF-8"], 1),
    ("no parquet file at all", lambda folder: (folder / "el.parquet").write_bytes(b"PAR1xxxxPAR1") and folder / "el.parquet", ["el.parquet, row 1", "can't be read"], 1),
    ("truncated parquet", parquet(GOOD, cut=20), ["el.parquet, row 1", "can't be read from here on"], 1),
    ("a parquet column that is missing", parquet(GOOD, field="content"), ["el.parquet, row 1", "no text field 'text'", "it has content"], 40),
    ("a parquet null", parquet([*GOOD[:3], None, *GOOD[3:]]), ["el.parquet, row 4", "null in the text field"], 1),
    ("a parquet column of numbers", parquet([1, 2]), ["el.parquet, row 1", "not a string"], 2),
    ("parquet text that is not UTF-8", parquet([g.encode() for g in GOOD[:5]] + [b"\xff\xfe"] + [g.encode() for g in GOOD[5:]]), ["el.parquet, row 6", "not UTF-8"], 1),
]  # fmt: skip


def data_of(path: Path, **settings: Any) -> DataConfig:
    other = path.parent / "more"
    other.mkdir()
    (other / "more.jsonl").write_bytes(lines([f"{text} more" for text in GOOD]))
    sources = [{"path": str(path)}, {"path": str(other)}]  # so that a set is left where a whole file is lost
    return DataConfig.model_validate({"held_out": {"fraction": 0.1}, "new": {"el": {"sources": sources}}} | settings)


@pytest.mark.parametrize(("write", "says"), [row[1:3] for row in ROWS], ids=[row[0] for row in ROWS])
def test_a_bad_row_stops_the_job_with_one_line(
    write: Callable[[Path], Path], says: list[str], save_tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as raised:
        prepare(data_of(write(tmp_path)), save_tokenizer(), 300, tmp_path / "cache", seed=17)
    assert "\n" not in str(raised.value)
    for words in says:
        assert words in str(raised.value)
    assert "data.bad_rows=skip" in str(raised.value)
    assert not list((tmp_path / "cache" / "tokens").glob("[!.]*"))


@pytest.mark.parametrize(("write", "says", "lost"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_a_bad_row_is_counted_and_skipped_where_the_run_says_so(
    write: Callable[[Path], Path], says: list[str], lost: int, save_tokenizer: Any,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    held_out = {"fraction": 0.1, "near_copy_threshold": 1.0}
    data = data_of(write(tmp_path), held_out=held_out, bad_rows="skip")
    store = prepare(data, save_tokenizer(), 300, tmp_path / "cache", seed=17)
    report = store.sets["el"].manifest.bad_rows
    assert report.rows == lost
    for words in says:
        assert words in report.examples[0]
    assert report == store.statistics.sets["el"].bad_rows
    assert f"set el: {lost} bad rows skipped: {report.examples[0][:40]}" in capsys.readouterr().out
    entry = store.sets["el"].manifest
    assert entry.train is not None
    kept = entry.train.documents + entry.held_out.documents + sum(d.documents for d in entry.dropped.values())
    if "jsonl" in says[0] or "row 21" in says[0]:
        assert kept >= 80  # every good row before it, and after it where there is one
    store.verify()


def test_rows_of_a_later_slice_are_named_by_their_number_in_the_file(save_tokenizer: Any, tmp_path: Path) -> None:
    path = jsonl(b"oops\n")(tmp_path)
    for slice_bytes in (50, 333, 1000):
        data = DataConfig.model_validate({"new": {"el": {"path": str(path)}}, "slice_bytes": slice_bytes})
        with pytest.raises(UserError, match=r"el\.jsonl, row 21: not JSON"):
            prepare(data, save_tokenizer(), 300, tmp_path / "cache", seed=17)


def test_empty_texts_are_counted_with_their_places(save_tokenizer: Any, tmp_path: Path) -> None:
    path = jsonl(b'{"text": " \\n "}\n{"text": ""}\n')(tmp_path)
    data = DataConfig.model_validate({"new": {"el": {"path": str(path)}}, "held_out": {"fraction": 0.1}})
    empty = prepare(data, save_tokenizer(), 300, tmp_path / "cache", seed=17).sets["el"].manifest.dropped["empty"]
    assert empty.documents == 2
    assert empty.examples == [f"{path}, row 21", f"{path}, row 22"]


def test_an_unknown_language_code_is_named_before_any_work(save_tokenizer: Any, tmp_path: Path) -> None:
    path = jsonl(b"")(tmp_path)
    tree = {"new": {"gr": {"path": str(path)}}, "filters": {"language": {"threshold": 0.5}}}
    with pytest.raises(UserError, match=r"set gr: the language code 'gr' is not one that py3langid knows .*el"):
        prepare(DataConfig.model_validate(tree), save_tokenizer(), 300, tmp_path / "cache", seed=17)
    assert not list((tmp_path / "cache" / "tokens").glob("*.work"))


def test_a_tokenizer_that_changed_since_the_last_run_is_named(save_tokenizer: Any, tmp_path: Path) -> None:
    data = DataConfig.model_validate({"new": {"el": {"path": str(jsonl(b"")(tmp_path))}}})
    data = data.model_copy(update={"held_out": data.held_out.model_copy(update={"fraction": 0.1})})
    folder = save_tokenizer()
    store = prepare(data, folder, 300, tmp_path / "cache", seed=17)
    save_tokenizer(special=("<|endoftext|>", "<other>"))
    with pytest.raises(UserError, match=r"tokenizer has changed since the last run .*--force"):
        prepare(data, folder, 300, tmp_path / "cache", seed=17)
    save_tokenizer()
    assert prepare(data, folder, 300, tmp_path / "cache", seed=17).keys == store.keys


RUN = """
name: tiny
cache_dir: {folder}/cache
model: {{path: {tokenizer}}}
data:
  held_out: {{fraction: 0.1}}
  new: {{el: {{path: {folder}/el.jsonl}}}}
experts: {{allocation: uniform, num_new: 2}}
stage1: {{tokens: 1024, sequence_length: 16, global_batch_size: 2}}
"""


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_a_full_disk_is_named_and_the_same_command_goes_on_when_there_is_room(
    save_tokenizer: Any, tmp_path: Path, workers: str
) -> None:
    tokenizer = save_tokenizer()
    LlamaConfig(vocab_size=300).save_pretrained(tokenizer)
    (tmp_path / "el.jsonl").write_bytes(lines(GOOD * 500))
    (tmp_path / "run.yaml").write_text(RUN.format(folder=tmp_path, tokenizer=tokenizer))

    def command(most_bytes: int | None) -> subprocess.CompletedProcess[str]:
        def limit() -> None:
            if most_bytes is not None:  # no file may grow beyond: the system refuses the write, as on a full disk
                resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))

        argv = [sys.executable, "-m", "data_prep", str(tmp_path / "run.yaml"), "--workers", workers]
        return subprocess.run(argv, check=False, capture_output=True, text=True, cwd=ROOT, preexec_fn=limit)

    failed = command(200_000)
    assert failed.returncode == 2, failed.stderr
    [line] = [line for line in failed.stderr.splitlines() if line.strip()]
    assert "can't be written" in line and "make room" in line
    assert not list((tmp_path / "cache" / "tokens").glob("[!.]*"))
    done = command(None)
    assert done.returncode == 0, done.stderr
    [folder] = set_folders(tmp_path / "cache")
    TokenSet(folder).verify()
