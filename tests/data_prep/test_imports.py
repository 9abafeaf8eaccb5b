"""What imports what in common and data_prep. Run: pytest tests/data_prep/test_imports.py"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("common", "data_prep")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def imported(path: Path) -> set[str]:
    """The modules of ours that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.split(".")[0] in ("common", "data_prep", "pipeline")}


@pytest.mark.parametrize(("folder", "allowed"), [("common", {"common"}), ("data_prep", {"common", "data_prep"})])
def test_a_folder_imports_only_what_stands_below_it(folder: str, allowed: set[str]) -> None:
    for name, path in FILES.items():
        if name.split(".")[0] == folder:
            assert {module.split(".")[0] for module in imported(path)} <= allowed, name


def test_no_imports_go_in_a_circle() -> None:
    left = {name: imported(path) & FILES.keys() - {name} for name, path in FILES.items()}
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert left == {}
