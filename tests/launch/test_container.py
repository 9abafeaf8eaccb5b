"""The images install what requirements.txt says, and keep their torch. Run: pytest tests/launch/test_container.py"""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.launch.test_commands import ROOT

CONTAINER = ROOT / "launch" / "container"
DOCKERFILE = (CONTAINER / "Dockerfile").read_text()
DEFINITION = (CONTAINER / "apptainer.def").read_text()
INSTALL = CONTAINER / "install.sh"
REQUIREMENTS = (ROOT / "requirements.txt").read_text().splitlines()
PYTHON = """\
#!/usr/bin/env bash
# Stands for an image's python: tells torch's version, and keeps what pip is asked for.
if [ "$1" = -c ]; then
  [ -e "$FOLDER/torch_replaced" ] && echo 2.13.0 || echo "$TORCH"
  exit
fi
echo "$*" >>"$FOLDER/calls"
if [[ "$*" == *" -r "* ]]; then
  cp "$6" "$8" "$FOLDER" # the files of -r and -c
  [ -z "${REPLACES:-}" ] || touch "$FOLDER/torch_replaced"
fi
"""


def section(name: str) -> str:
    """A part of the Apptainer definition."""
    return re.split(r"^%\w+\n", DEFINITION.partition(f"%{name}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def install(folder: Path, torch: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run install.sh with a python that only takes notes."""
    python = folder / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(python), "FOLDER": str(folder), "TORCH": torch, **variables}
    return subprocess.run(["bash", INSTALL, ROOT], env=environment, text=True, capture_output=True, check=False)


def test_both_images_begin_with_the_same_tag_of_a_torch_that_works() -> None:
    (of_docker,) = re.findall(r"^ARG TAG=(\S+)$", DOCKERFILE, re.MULTILINE)
    (of_apptainer,) = re.findall(r"^\s+TAG=(\S+)$", section("arguments"), re.MULTILINE)
    assert of_docker == of_apptainer
    works = re.search(r"(2\.\d+) to (2\.\d+) work", REQUIREMENTS[0])
    assert works is not None
    first, last = (tuple(map(int, version.split("."))) for version in works.groups())
    torch = tuple(map(int, of_docker.split("-")[0].split(".")[:2]))
    assert first <= torch <= last
    said = re.findall(r"(2\.\d+)\.\*", INSTALL.read_text())
    assert said == [f"2.{minor}" for minor in range(first[1], last[1] + 1)]


def test_both_images_hold_all_packages_and_what_launching_reads() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"][
        "include"
    ]
    wanted = {*(name.removesuffix("*") for name in packages), "launch", "ds_configs"}
    wanted |= {"requirements.txt", "pyproject.toml", "README.md"}
    copied = {word for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE) for word in line.split()}
    files = {line.split()[0] for line in section("files").splitlines() if line.strip()}
    assert copied == files == wanted
    assert all((ROOT / name).exists() for name in wanted)


@pytest.mark.parametrize("text", [section("post"), section("environment"), INSTALL.read_text()])
def test_shell_lines_parse(text: str) -> None:
    assert text.strip()
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_requirements_are_installed_beside_the_images_torch(tmp_path: Path) -> None:
    assert install(tmp_path, "2.11.0+cu128").returncode == 0
    pinned = [line for line in REQUIREMENTS if line.startswith("torch==")]
    installed = (tmp_path / "requirements.txt").read_text().splitlines()
    assert len(pinned) == 1 and installed == [line for line in REQUIREMENTS if line not in pinned]
    assert (tmp_path / "constraints.txt").read_text() == "torch==2.11.0+cu128\n"
    assert (tmp_path / "calls").read_text().splitlines()[-1].endswith(f"--no-deps -e {ROOT}")


def test_another_torch_is_refused_and_one_that_pip_replaces_is_an_error(tmp_path: Path) -> None:
    old = install(tmp_path, "2.9.1+cu128")
    assert old.returncode == 2 and not (tmp_path / "calls").exists()
    assert old.stderr == "error: the image has torch 2.9.1+cu128; 2.11 to 2.13 work: choose another tag\n"
    replaced = install(tmp_path, "2.12.0+cu130", REPLACES="yes")
    assert replaced.returncode == 1 and "pip has replaced the image's torch 2.12.0+cu130" in replaced.stderr
