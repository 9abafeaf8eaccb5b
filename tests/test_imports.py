"""Every file imports only what stands above it, and no two files import each other.

Run: pytest tests/test_imports.py
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("common", "data_prep", "pipeline")
# The folders of pipeline/, from the bottom of the house to the top: each imports only those before it.
ROOMS = (
    "config",
    "records",
    "distributed",
    "model",
    "checkpoint",
    "method",
    "evaluation",
    "export",
    "training",
    "report",
    "comparison",
    "estimate",
    "run",
    "cluster",
    "sweep",
    "cli",
)


def modules(root: Path) -> dict[str, Path]:
    """By dotted name, every file of the product below a folder."""
    files = (path for package in PACKAGES for path in (root / package).rglob("*.py"))
    return {_name(root, path): path for path in files}


def _name(root: Path, path: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The product's modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
            if any(name in known for name in names[1:]):
                names = [name for name in names[1:] if name in known] + [
                    str(node.module) for alias in node.names if f"{node.module}.{alias.name}" not in known
                ]
        yield from (name for name in names if name in known)


def graph(root: Path) -> dict[str, set[str]]:
    """By module, what it imports."""
    known = modules(root)
    return {name: set(imports(path, known)) - {name} for name, path in known.items()}


def height(name: str) -> int:
    """Where a module stands: what it imports stands at the same height or lower."""
    package, _, rest = name.partition(".")
    if package != "pipeline":
        return PACKAGES.index(package)
    room = rest.partition(".")[0]
    if room in ("", "__main__"):
        return 2 + len(ROOMS)
    return 2 + ROOMS.index(room)


def steps_upwards(edges: dict[str, set[str]]) -> list[str]:
    """A line for each import of something that stands above."""
    return [
        f"{importer} imports {imported}, which stands above it"
        for importer, found in sorted(edges.items())
        for imported in sorted(found)
        if height(imported) > height(importer)
    ]


def circles(edges: dict[str, set[str]]) -> list[str]:
    """A line for each pair of modules that reach each other by imports."""
    reached: dict[str, set[str]] = {}
    for start in edges:
        seen: set[str] = set()
        waiting = list(edges[start])
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting += edges[name]
        reached[start] = seen
    return [
        f"{first} and {second} import each other"
        for first in sorted(edges)
        for second in sorted(edges)
        if first < second and second in reached[first] and first in reached[second]
    ]


def test_nothing_imports_what_stands_above_it() -> None:
    assert steps_upwards(graph(ROOT)) == []


def test_no_two_files_import_each_other() -> None:
    assert circles(graph(ROOT)) == []


def test_every_room_is_in_the_list() -> None:
    found = {name.split(".")[1] for name in modules(ROOT) if name.startswith("pipeline.")} - {"__main__"}
    assert found == set(ROOMS)


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A small house: common/errors, data_prep/plan, pipeline/model/layer, pipeline/training/train."""
    for name in ("common/errors", "data_prep/plan", "pipeline/model/layer", "pipeline/training/train"):
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in (path.parent, tmp_path / name.split("/")[0]):
            (folder / "__init__.py").touch()
        path.touch()
    return tmp_path


def test_a_step_upwards_names_both_files(house: Path) -> None:
    (house / "pipeline/model/layer.py").write_text("def f():\n    from pipeline.training import train\n")
    (house / "common/errors.py").write_text("import data_prep.plan\n")
    assert steps_upwards(graph(house)) == [
        "common.errors imports data_prep.plan, which stands above it",
        "pipeline.model.layer imports pipeline.training.train, which stands above it",
    ]


def test_a_circle_names_both_files(house: Path) -> None:
    (house / "common/more.py").write_text("from common.errors import Error\n")
    (house / "common/errors.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from common.more import More\n"
    )
    assert circles(graph(house)) == ["common.errors and common.more import each other"]


def test_the_command_line_starts_without_torch_and_deepspeed() -> None:
    """They take seconds to import, and DeepSpeed prints lines that a shell would take for a verb's output."""
    code = "import sys, pipeline.cli.main; print(sorted({'torch', 'deepspeed'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
