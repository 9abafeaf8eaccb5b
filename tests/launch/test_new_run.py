"""From a model and text of one's own to the first loss, in two commands. Run: pytest tests/launch/test_new_run.py"""

import json
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from pipeline.config.load import load_run
from pipeline.records.metrics import StepRow
from pipeline.run.new_run import write_new_run
from tests.helpers.tiny import save_corpus, save_model
from tests.launch.test_commands import ROOT, command


def save_texts(folder: Path) -> None:
    """A Qwen3, a jsonl of English whose text is in ``content``, and a folder of Turkish text files."""
    save_model(folder / "model", "qwen3")
    corpus = save_corpus(folder / "source", ["en", "tr"])
    with open(folder / "english.jsonl", "w", encoding="utf-8") as file:
        for line in corpus["en"].read_text(encoding="utf-8").splitlines():
            file.write(json.dumps({"id": "x", "content": json.loads(line)["text"]}) + "\n")
    (folder / "tr").mkdir()
    for number, line in enumerate(corpus["tr"].read_text(encoding="utf-8").splitlines()):
        (folder / "tr" / f"{number:03}.txt").write_text(json.loads(line)["text"], encoding="utf-8")


@pytest.mark.slow
def test_own_model_and_text_train_without_an_edit(tmp_path: Path) -> None:
    save_texts(tmp_path)
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")

    def pipeline(*words: str) -> str:
        return command(sys.executable, "-m", "pipeline", *words, cwd=tmp_path, PYTHONPATH=str(ROOT))

    made = pipeline("new", "my.yaml", "--model", "model", "--old", "en=english.jsonl", "--new", "tr=tr")
    assert "my.yaml: written; look at it, then: python -m pipeline run my.yaml" in made
    ran = pipeline("run", "my.yaml", "--until", "stage1")
    assert "warning: stage" not in ran and "warning: similarity" not in ran
    rows = StepRow.load_rows(tmp_path / "runs" / "my" / "stage1" / "metrics.jsonl")
    assert rows[-1].step == load_run(tmp_path / "my.yaml").stage1.num_steps
    assert rows[-1].loss["next_token"] < rows[0].loss["next_token"]


def test_values_fit_the_model_and_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_texts(tmp_path)
    monkeypatch.chdir(tmp_path)
    write_new_run(Path("my.yaml"), "model", ["en=english.jsonl"], ["tr=tr"])
    run = load_run("my.yaml")
    assert run.name == "my"
    assert run.data.old["en"].text_field == "content"
    assert run.data.new["tr"].text_unit == "file"
    assert 0.05 <= run.data.held_out.fraction <= 0.1  # of 60 documents
    assert run.experts.num_new == 2 * 4
    assert run.stage1.sequence_length <= 256 and run.stage1.num_steps >= 20
    assert run.stage2 is not None and run.stage2.num_steps >= 2


@pytest.mark.parametrize(
    ("old", "line"),
    [
        ("english.jsonl", r"english\.jsonl: not of the form NAME=PATH"),
        ("en=missing.jsonl", r"missing\.jsonl: does not exist"),
        ("tr=english.jsonl", r"the name is used in old too; rename one of the sets"),
        ("en=numbers.jsonl", r"numbers\.jsonl: its first rows hold no field with text"),
    ],
)
def test_a_text_that_cannot_be_used_is_named_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, line: str
) -> None:
    save_texts(tmp_path)
    (tmp_path / "numbers.jsonl").write_text('{"a": 1}\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=line):
        write_new_run(Path("my.yaml"), "model", [old], ["tr=tr"])
    assert not Path("my.yaml").exists()


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"my\.yaml: exists already"):
        write_new_run(Path("my.yaml"), "model", ["en=a"], ["tr=b"])
    assert Path("my.yaml").read_text() == "mine"


def test_a_name_that_no_run_can_have_is_one_line_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_texts(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"my run\.yaml: name: 'my run' is not allowed"):
        write_new_run(Path("my run.yaml"), "model", ["en=english.jsonl"], ["tr=tr"])
    assert not Path("my run.yaml").exists()
