"""A Hugging Face hub on this machine: the few addresses that huggingface_hub asks, served from folders.

A repository is a folder; each of its commits is a folder of files under it, named by its hash, and ``main`` holds the
hash of the newest.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.helpers.hub_uploads import Uploads


class Hub(ThreadingHTTPServer):
    """The server; ``requests`` are the addresses that were asked for, ``created`` the models that clients made."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.requests: list[str] = []
        self.created: dict[str, dict[str, Any]] = {}

    @property
    def address(self) -> str:
        """What HF_ENDPOINT is to be."""
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, kind: str, name: str, files: dict[str, bytes]) -> str:
        """Make a new commit of a repository (kind: models or datasets); returns its hash."""
        repository = self.folder / kind / name.replace("/", "--")
        sha = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        (repository / sha).mkdir(parents=True, exist_ok=True)
        for path, content in files.items():
            target = repository / sha / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        (repository / "main").write_text(sha)
        return sha

    def files(self, kind: str, name: str) -> dict[str, bytes]:
        """The files of the newest commit."""
        repository = self.folder / kind / name.replace("/", "--")
        folder = repository / (repository / "main").read_text()
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class _Handler(Uploads):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _answer(self, *, with_body: bool) -> None:
        address = urlsplit(self.path)
        path, self.query = unquote(address.path).strip("/"), parse_qs(address.query)
        self.server.requests.append(path)
        parts = path.split("/")
        if parts[0] == "api":
            status, headers, body = self._api(parts[1], "/".join(parts[2:4]), parts[4:])
        else:
            kind = parts.pop(0) if parts[0] in ("datasets", "spaces") else "models"
            status, headers, body = self._file(kind, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def _commit_folder(self, kind: str, name: str, revision: str) -> Path | None:
        repository = self.server.folder / kind / name.replace("/", "--")
        if revision == "main" and (repository / "main").is_file():
            revision = (repository / "main").read_text()
        folder = repository / revision
        return folder if folder.is_dir() else None

    def _api(self, kind: str, name: str, rest: list[str]) -> tuple[int, dict[str, str], bytes]:
        what, revision = (rest + ["", "main"])[0] or "revision", rest[1] if len(rest) > 1 else "main"
        folder = self._commit_folder(kind, name, revision)
        if folder is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = {path: str(path.relative_to(folder)) for path in files}
        if what == "tree":
            answer: Any = self._tree(folder, "/".join(rest[2:]))
            if not answer:
                return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"
        else:
            siblings = [{"rfilename": names[path], "size": path.stat().st_size} for path in files]
            answer = {"id": name, "modelId": name, "sha": folder.name, "siblings": siblings, "private": False}
            answer["cardData"] = _card_data(folder / "README.md")
        return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()

    def _tree(self, folder: Path, path: str) -> list[dict[str, Any]]:
        """What lies in a folder of a commit; with ?recursive, and in its folders."""
        deep = self.query.get("recursive", ["false"])[0].lower() == "true"
        return [
            {
                "type": "file" if entry.is_file() else "directory",
                "path": str(entry.relative_to(folder)),
                "size": entry.stat().st_size if entry.is_file() else 0,
                "oid": _etag(entry) if entry.is_file() else "0" * 40,
            }
            for entry in sorted((folder / path).rglob("*") if deep else (folder / path).glob("*"))
        ]

    def _file(self, kind: str, name: str, revision: str, path: str) -> tuple[int, dict[str, str], bytes]:
        folder = self._commit_folder(kind, name, revision)
        if folder is None or not (folder / path).is_file():
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        file = folder / path
        return 200, {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": folder.name}, file.read_bytes()


def _card_data(card: Path) -> dict[str, Any]:
    """The metadata between the lines of a card's head."""
    if not card.is_file() or not card.read_text().startswith("---"):
        return {}
    return yaml.safe_load(card.read_text().split("---")[1]) or {}


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextmanager
def running_hub(folder: Path) -> Iterator[Hub]:
    """A hub that serves what is committed to it."""
    hub = Hub(folder)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
