"""What can be wrong with a run's sets, and the command. Run: pytest tests/data_prep/test_prepare_mistakes.py"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from data_prep.store import TokenSet
from tests.helpers.preparation import changed, prepare, set_folders
from tests.helpers.preparation_jobs import Job, write_preparation_run


@pytest.mark.parametrize(
    ("fraction", "error"),
    [
        (1e-9, r"data\.old\.en: none of 60 documents is held out .* raise the fraction"),
        (1 - 1e-9, r"data\.old\.en: no document is left to train on, 60 are held out .* lower the fraction"),
    ],
)
def test_an_empty_part_is_an_error_that_says_how_to_fix_it(
    two_languages, tokenizer, tmp_path: Path, fraction: float, error: str
) -> None:
    with pytest.raises(UserError, match=error):
        prepare(changed(two_languages, held_out__fraction=fraction), tokenizer, 300, tmp_path / "cache", seed=17)
    assert list((tmp_path / "cache" / "tokens").glob("[!.]*")) == []


def test_a_watch_set_without_text_is_an_error(two_languages, write_rows, tokenizer, tmp_path: Path) -> None:
    data = changed(two_languages, watch__seen__path=str(write_rows("blank.jsonl", [{"text": " "}])))
    with pytest.raises(UserError, match=r"data\.watch\.seen: no document with text \(1 empty"):
        prepare(data, tokenizer, 300, tmp_path / "cache", seed=17)


def test_a_path_that_does_not_exist_names_the_set(two_languages, tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.new\.el\.path: nowhere\.jsonl: does not exist"):
        prepare(changed(two_languages, new__el__path="nowhere.jsonl"), tokenizer, 300, tmp_path / "cache", seed=17)


RUN = """
name: tiny
cache_dir: {folder}/cache
model: {{path: {folder}/tokenizer}}
data:
  held_out: {{by: page, fraction: 0.1}}
  replay: null
  old: {{en: {{path: {folder}/en.jsonl}}}}
  new: {{el: {{path: {folder}/el.jsonl}}}}
experts: {{allocation: uniform, num_new: 2}}
stage1: {{tokens: 1024, sequence_length: 16, global_batch_size: 2}}
"""


def test_the_command_tokenizes_a_run_and_turns_a_mistake_into_one_line(
    two_languages, tokenizer, tmp_path: Path
) -> None:
    from transformers import LlamaConfig

    LlamaConfig(vocab_size=300).save_pretrained(tokenizer)
    run = tmp_path / "tiny.yaml"
    run.write_text(RUN.format(folder=tmp_path))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "data_prep", str(run), *arguments]
        return subprocess.run(argv, check=False, capture_output=True, text=True, env=environment)

    done = command()
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()][:2] == [["OLD", "en"], ["NEW", "el"]]
    folders = set_folders(tmp_path / "cache")
    assert len(folders) == 2
    for folder in folders:
        TokenSet(folder).verify()
    failed = command("--set", "data.new.el.text_field=content")
    assert failed.returncode == 2
    assert failed.stderr.strip().count("\n") == 0
    assert "el.jsonl, row 1: no text field 'content'" in failed.stderr


@pytest.mark.parametrize(("backend", "ranks"), [("local", 2), pytest.param("mpi", 2, marks=pytest.mark.slow)])
def test_files_of_a_folder_that_are_not_read_are_named_once_where_its_set_is_prepared(
    backend: str, ranks: int, tmp_path: Path
) -> None:
    folder = tmp_path / "el"
    run = write_preparation_run(tmp_path, documents=60, new={"el": {"path": str(folder)}})
    folder.mkdir()
    (tmp_path / "el.jsonl").rename(folder / "el.jsonl")
    (folder / "notes.docx").write_bytes(b"x")
    assert set(Job(run, backend, ranks).wait()) == {0}, (tmp_path / "log.txt").read_text()
    said = [line for line in (tmp_path / "log.txt").read_text().splitlines() if "not read" in line]
    assert said == [
        f"tokens: {folder}: 1 file is not read (notes.docx): its format is unknown; "
        ".jsonl, .json, .csv, .tsv, .txt, .parquet or .arrow can be read"
    ]
    assert set(Job(run, backend, ranks).wait()) == {0}
    assert (tmp_path / "log.txt").read_text().count("not read") == 1
