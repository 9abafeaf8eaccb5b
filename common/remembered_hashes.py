"""SHA-256 of source files, remembered: a large corpus is hashed once, not at every run."""

from pathlib import Path
from typing import Any

from common.files import read_json, sha256_file, write_json


class RememberedHashes:
    """Hashes of files by (path, size, modification time in ns), kept in one JSON file."""

    def __init__(self, memory: Path) -> None:
        self._memory = memory

    def sha256(self, files: list[Path]) -> list[str]:
        """The hex sha256 of each file; a file is read only if it is new or has changed."""
        known: dict[str, list[Any]] = read_json(self._memory) if self._memory.exists() else {}
        found: dict[str, list[Any]] = {}
        for file in files:
            status = file.stat()
            name, stamp = str(file.resolve()), [status.st_size, status.st_mtime_ns]
            entry = known.get(name)
            found[name] = entry if entry is not None and entry[:2] == stamp else [*stamp, sha256_file(file)]
        if any(known.get(name) != entry for name, entry in found.items()):
            write_json(self._memory, {**known, **found})
        return [found[str(file.resolve())][2] for file in files]
