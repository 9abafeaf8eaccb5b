"""Files that are either complete or absent, and what they hash to."""

import errno
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from common.errors import UserError


def sha256_file(path: Path) -> str:
    """The hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_key(value: Any) -> str:
    """A short hex key of a JSON-serialisable value; equal values have equal keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def fsync_path(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``; what is written there is synced and takes its name when the block ends.

    After an error nothing of it stays. Hosts that share the disk don't share temporary names.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp{platform.node()}-{os.getpid()}")
    try:
        yield temporary
        fsync_path(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, sync it, and rename it into place."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def write_once(path: Path, content: bytes) -> None:
    """Write a file as :func:`write_bytes` does, unless there is one: of several processes, the first one's stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new{platform.node()}-{os.getpid()}")
    try:
        temporary.write_bytes(content)
        fsync_path(temporary)
        with suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_path(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file as :func:`write_bytes` does, in UTF-8."""
    write_bytes(path, text.encode())


def save_array(path: Path, values: Any) -> None:
    """Write a numpy array as a .npy file, as :func:`write_bytes` does."""
    import numpy as np  # reads variables such as OMP_NUM_THREADS, which a rank sets first

    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.save(file, values)


def json_text(value: Any) -> str:
    """JSON as this product's files hold it: indented for people."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file as :func:`write_text` does."""
    write_text(path, json_text(value))


def read_json(path: Path) -> Any:
    """Read a JSON file; a damaged one is a :class:`UserError` that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: can't be read as JSON ({error}); delete it and run the step again") from error


def link_or_copy(path: Path | str, new: Path | str) -> None:
    """A hard link to a file that nobody changes in place; a copy where the file system has no such link."""
    try:
        os.link(path, new)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EXDEV, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS):
            raise
        shutil.copyfile(path, new)
        fsync_path(Path(new))


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its name when the block ends without an error.

    What an interrupted run left behind under the temporary name is removed first, so nothing
    half-written is ever found under ``target``.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if target.exists():
        shutil.rmtree(target)
    os.replace(temporary, target)
    fsync_path(target.parent)
