"""Fetches the demo's packages with the registries' ordinary clients (pip, apt-get, npm) into a folder that is kept."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path

from common.errors import UserError
from common.files import sha256_file


def _fetch(folder: Path, pattern: str, command: list[str]) -> Path:
    """Run `command` in an empty folder and move the one file it leaves, matching `pattern`, into `folder`.

    The client writes elsewhere and the file is renamed when whole, so a killed download is never taken for a file.
    Raises UserError with the client's last line.
    """
    print(f"fetching: {' '.join(command)}", flush=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as empty:
        try:
            done = _run(command, cwd=empty)
        except FileNotFoundError:
            raise UserError(f"{command[0]} is not installed") from None
        files = sorted(Path(empty).glob(pattern))
        if done.returncode != 0 or len(files) != 1:
            raise UserError(f"`{' '.join(command)}` failed: {_last_line(done.stderr) or 'it fetched nothing'}")
        os.replace(files[0], folder / files[0].name)
        return folder / files[0].name


def _run(
    command: list[str], cwd: str | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, check=False, cwd=cwd, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


def _last_line(text: str) -> str:
    """The last line of a client's complaint that says something of substance."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(E:|ERROR|npm ERR!|npm error)", line)]
    errors = [line for line in errors if "log of this run" not in line] or errors
    return (errors or lines or [""])[-1][:300]


def _fetch_pinned(folder: Path, name: str, sha256: str, fetch: Callable[[], Path]) -> Path:
    """`folder/name` if it is there and whole, else what `fetch` brings; raises UserError if that has another hash."""
    path = folder / name
    if path.exists():
        if sha256_file(path) == sha256:
            return path
        print(f"{path}: damaged, fetching it again", flush=True)
        path.unlink()
    path = fetch()
    if (found := sha256_file(path)) != sha256:
        path.unlink()
        raise UserError(f"{name} has sha256 {found} where {sha256} is expected")
    return path


def fetch_wheel(folder: Path, package: str, version: str, sha256: str) -> Path:
    """The pure-Python wheel of a PyPI package, its hash checked."""
    name = f"{package.replace('-', '_')}-{version}-py3-none-any.whl"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", ".", f"{package}=={version}"]
    return _fetch_pinned(folder, name, sha256, lambda: _fetch(folder, "*.whl", command))


def fetch_npm(folder: Path, package: str, version: str, sha256: str) -> Path:
    """The tarball of an npm package, its hash checked. Installs Debian's npm if there is none and we are root."""

    def fetch() -> Path:
        if shutil.which("npm") is None:
            _install_npm()
        return _fetch(folder, "*.tgz", ["npm", "pack", f"{package}@{version}", "--silent"])

    return _fetch_pinned(folder, f"{package}-{version}.tgz", sha256, fetch)


def _install_npm() -> None:
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise UserError("npm is not installed (on Debian: apt-get install npm)")
    print("installing npm: apt-get install --yes --no-install-recommends npm", flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "--yes", "--no-install-recommends", "npm"]
    for command in (["apt-get", "update"], install):
        done = _run(command, env=environment)
        if done.returncode != 0:
            raise UserError(f"`{' '.join(command)}` failed: {_last_line(done.stderr)}")


def fetch_deb(folder: Path, package: str) -> Path:
    """A Debian package's file in the version that apt's lists name; one that was fetched before is used again.

    As root, apt's lists are updated and the download tried again if it fails at first (no lists, or stale ones).
    """
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise UserError("this is not a Debian system (no apt-get and dpkg-deb)")
    before = sorted(folder.glob(f"{package}_*.deb"))
    if before:
        if _run(["dpkg-deb", "--info", str(before[-1])]).returncode == 0:
            return before[-1]
        print(f"{before[-1]}: damaged, fetching it again", flush=True)
        before[-1].unlink()
    command = ["apt-get", "download", package]
    try:
        return _fetch(folder, "*.deb", command)
    except UserError:
        if os.geteuid() != 0:
            raise
    print("updating apt's lists: apt-get update", flush=True)
    _run(["apt-get", "update"])
    return _fetch(folder, "*.deb", command)


def deb_version(deb: Path) -> str:
    """The version in a Debian package's file name (apt writes its colon as %3a)."""
    return urllib.parse.unquote(deb.name.split("_")[1])


def read_deb(deb: Path, suffix: str) -> Iterator[tuple[str, bytes]]:
    """(path, content) of every regular file in a Debian package whose name ends in `suffix`, read without unpacking.

    A package that does not unpack is deleted, so that the next run fetches it again, and raises UserError.
    """
    broken = False
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None, "it is piped"
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
                for member in tar:
                    content = tar.extractfile(member) if member.name.endswith(suffix) else None
                    if content is not None:
                        yield member.name, content.read()
        except tarfile.TarError:
            broken = True
        process.stdout.read()  # what follows the tar's end, so that dpkg-deb can finish
    if broken or process.returncode != 0:
        deb.unlink()
        raise UserError(f"{deb} is damaged: it has been deleted, run again to fetch it")
