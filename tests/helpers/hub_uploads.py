"""What the hub of the tests does when it is written to: makes models, and takes files in commits.

Small files come within the commit; large ones are stored beforehand under their hash (git-lfs's batch API).
"""

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from tests.helpers.hub_server import Hub

LARGE = ".safetensors"
TOKEN = "hf_of_the_tests"


class Uploads(BaseHTTPRequestHandler):
    """The part of the handler that writes."""

    server: "Hub"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.requests.append(f"POST {path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._say(401, {"error": "Invalid username or password."})
        elif path == "api/validate-yaml":
            self._say(200, {"errors": [], "warnings": []})
        elif path == "api/repos/create":
            self._create(json.loads(body))
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._say(
                200, {"transfer": "basic", "objects": [self._stored(one) for one in json.loads(body)["objects"]]}
            )
        else:
            _, _, owner, name, what, _ = path.split("/")
            self._preupload(body) if what == "preupload" else self._take(f"{owner}/{name}", body)

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.strip("/").split("/")[-1]
        self.server.requests.append(f"PUT {oid}")
        assert hashlib.sha256(content).hexdigest() == oid
        self._large_file(oid).write_bytes(content)
        self._say(200, {})

    def _say(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        is_there = name in self.server.created
        if not is_there:
            self.server.created[name] = asked
            self.server.commit("models", name, {".gitattributes": b"*.safetensors filter=lfs\n"})
        self._say(409 if is_there else 200, {"url": f"{self.server.address}/{name}"})

    def _preupload(self, body: bytes) -> None:
        files = [
            {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith(LARGE) else "regular",
             "shouldIgnore": False}
            for one in json.loads(body)["files"]
        ]  # fmt: skip
        self._say(200, {"files": files})

    def _stored(self, one: dict[str, Any]) -> dict[str, Any]:
        upload = {"upload": {"href": f"{self.server.address}/large/{one['oid']}"}}
        return {**one, **({} if self._large_file(one["oid"]).is_file() else {"actions": upload})}

    def _large_file(self, oid: str) -> Path:
        folder = self.server.folder / "large"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / oid

    def _take(self, name: str, body: bytes) -> None:
        files = self.server.files("models", name)
        for line in body.decode().splitlines():
            entry = json.loads(line)
            kind, value = entry["key"], entry["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self._large_file(value["oid"]).read_bytes()
            elif kind == "deletedFile":
                del files[value["path"]]
        sha = self.server.commit("models", name, files)
        self._say(200, {"commitUrl": f"{self.server.address}/{name}/commit/{sha}", "commitOid": sha})
