"""Settings from YAML: ``key.sub=value`` overrides, and each mistake as one line that names the key and the fix."""

import difflib
import re
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from common.errors import UserError
from common.section import Section
from common.yaml_reader import parse_yaml

Settings = TypeVar("Settings", bound=Section)


def load_settings(kind: type[Settings], path: str | Path, overrides: list[str] | None = None) -> Settings:
    """Read a YAML file, apply ``key.sub=value`` overrides, and check all that ``kind`` knows.

    Raises:
        UserError: one line for each mistake, naming the file, the key, the value and the fix.
    """
    tree = read_tree(path)
    for override in overrides or []:
        _apply_override(tree, override)
    return parse_settings(kind, tree, str(path))


def read_tree(path: str | Path) -> dict[str, Any]:
    """A YAML file's keys, unchecked.

    Raises:
        UserError: it can't be read, or holds no keys.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: can't be read ({error}); name a run's YAML, such as launch/runs/my-languages.yaml"
        ) from error
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds no keys; copy launch/runs/my-languages.yaml and change it")
    return tree


def parse_settings(kind: type[Settings], tree: dict[str, Any], name: str) -> Settings:
    """Check settings given as nested dicts; ``name`` says in errors where they came from.

    Raises:
        UserError: one line for each mistake.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        lines = [f"{name}: {_explain(kind, dict(problem))}" for problem in error.errors()]
        raise UserError("\n       ".join(lines)) from error


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"--set {override}: not of the form key=value, such as --set stage1.lr=1e-4")
    set_key(tree, key.strip(), parse_yaml(text, f"--set {key}"), f"--set {override}")


def set_key(tree: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set a dotted key, in place; ``where`` says in errors who asks for it.

    Raises:
        UserError: a part of the key holds something that has no keys.
    """
    *parents, last = key.split(".")
    for part in parents:
        child = tree.get(part)
        if child is None:
            child = tree[part] = {}
        if not isinstance(child, dict):
            raise UserError(f"{where}: {part} holds {child!r}, which has no keys of its own; check the name")
        tree = child
    tree[last] = value


def _explain(kind: type[Section], problem: dict[str, Any]) -> str:
    """One line for one pydantic error: the key, the value, and what is allowed."""
    location = ".".join(str(part) for part in problem["loc"])
    error, value, message = problem["type"], problem["input"], str(problem["msg"])
    if error == "extra_forbidden":
        return f"{location}: unknown key; {_nearest_key(kind, problem['loc'])}"
    if error == "missing":
        return f"{location}: missing; add it"
    if error == "value_error":
        message = message.removeprefix("Value error, ")
        return f"{location}: {message}" if location else message
    return f"{location}: {value!r} is not allowed; {re.sub(r'^[A-Z][a-z]* should', 'it should', message)}"


def _nearest_key(kind: type[Section], location: tuple[str | int, ...]) -> str:
    section: Any = kind
    for part in location[:-1]:
        field = next((f for n, f in section.model_fields.items() if part in (n, f.alias)), None)
        found = _section_of(field.annotation) if field else None
        section = found or (section if field is None else None)
        if section is None:
            return "remove it"
    known = [field.alias or name for name, field in section.model_fields.items()]
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"


def _section_of(annotation: Any) -> Any:
    """The Section inside an annotation such as ``X``, ``X | None`` or ``dict[str, X]``."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for part in getattr(annotation, "__args__", ()):
        found = _section_of(part)
        if found is not None:
            return found
    return None
