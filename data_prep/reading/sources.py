"""Where a set's text lies: a source's files, in a fixed order, and the format of each."""

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from common.errors import UserError
from data_prep.config import SourceConfig

Format = Literal["jsonl", "csv", "tsv", "text", "lines", "parquet", "arrow", "hub"]
COMPRESSIONS = (".gz", ".zst")
NAMES_SHOWN = 3  # of files that are not read
_SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "text",
    ".parquet": "parquet",
    ".arrow": "arrow",
}


def compression_of(file: Path) -> str:
    """ ".gz", ".zst" or ""."""
    return file.suffix.lower() if file.suffix.lower() in COMPRESSIONS else ""


def format_of(file: Path, text_unit: str = "file") -> Format | None:
    """A file's format by its suffix, .gz and .zst aside; None where it can't be read."""
    compressed = bool(compression_of(file))
    found = _SUFFIXES.get((file.with_suffix("") if compressed else file).suffix.lower())
    if compressed and found in ("parquet", "arrow"):
        return None
    return "lines" if found == "text" and text_unit == "line" else found


def source_files(source: SourceConfig) -> list[Path]:
    """The files of a path: itself, those of a folder (at any depth) or those that a glob finds, in the order of names.

    Raises:
        UserError: nothing there, an unknown format, or an empty file.
    """
    assert source.path is not None, "a hub dataset has no files of its own"
    path = Path(source.path)
    if path.is_dir():
        files = _files_in(path)
    elif path.is_file():
        files = [path]
    elif any(letter in source.path for letter in "*?["):
        files = sorted(Path(name) for name in glob.glob(source.path, recursive=True) if Path(name).is_file())
        if not files:
            raise UserError(f"{path}: no file matches; fix the glob")
    else:
        raise UserError(f"{path}: does not exist; name a {known_formats()} file, a folder of them or a glob")
    for file in files:
        if format_of(file) is None:
            raise UserError(f"{file}: unknown format; {known_formats()} can be read (and .gz and .zst of text)")
        if file.stat().st_size == 0:
            raise UserError(f"{file}: empty; put text into it or name another path")
    return files


def known_formats() -> str:
    """The suffixes that can be read, for messages."""
    return " or ".join((", ".join(list(_SUFFIXES)[:-1]), list(_SUFFIXES)[-1]))


_OF_A_DATASET = ("state.json", "dataset_info.json", "dataset_dict.json")  # what `datasets` writes beside its files


def _files_in(folder: Path) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.name for path in folder.iterdir() if path.is_dir())
        raise UserError(f"{folder}: a dataset of several splits; name one of them: {folder}/{{{','.join(splits)}}}")
    found = sorted(file for file in _listed(folder) if format_of(file))
    if not found:
        raise UserError(f"{folder}: no {known_formats()} file in this folder; name another path")
    return found


def _listed(folder: Path) -> Iterator[Path]:
    """Its files at any depth, but for hidden ones and those that `datasets` writes beside its own."""
    for file in folder.rglob("*"):
        if file.is_file() and file.name not in _OF_A_DATASET and not file.name.startswith((".", "cache-")):
            yield file


def unread_line(path: str) -> str | None:
    """What to say of a source's files that are not read because their format is unknown; None where there are none.

    Only a folder has such files: a path or glob that names one is an error.
    """
    folder = Path(path)
    files = [file.relative_to(folder) for file in _listed(folder) if not format_of(file)] if folder.is_dir() else []
    names = sorted(str(file) for file in files if not any(part.startswith(".") for part in file.parts))
    if not names:
        return None
    shown = ", ".join(names[:NAMES_SHOWN])
    if len(names) > NAMES_SHOWN:
        shown += f" and {len(names) - NAMES_SHOWN:,} more"
    what, why = ("1 file is", "its") if len(names) == 1 else (f"{len(names):,} files are", "their")
    return f"{path}: {what} not read ({shown}): {why} format is unknown; {known_formats()} can be read"
