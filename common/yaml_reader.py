"""YAML as people mean it: ``no`` is Norwegian, ``5e-4`` is a number, a key given twice is a mistake."""

import re
from typing import Any

import yaml

from common.errors import UserError

_FLOAT = re.compile(
    r"""^(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
    |\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
    re.X,
)
_INT = re.compile(r"^[-+]?(?:0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)$")  # 24:00:00 is not a number in base 60
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without its traps."""


def _without(tags: set[str]) -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    resolvers = yaml.SafeLoader.yaml_implicit_resolvers
    return {first: [(tag, regex) for tag, regex in pairs if tag not in tags] for first, pairs in resolvers.items()}


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    for index, key in enumerate(keys):
        if key in keys[:index]:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", node.start_mark)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.yaml_implicit_resolvers = _without({f"tag:yaml.org,2002:{kind}" for kind in ("bool", "float", "int")})
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse_yaml(text: str, name: str) -> Any:
    """Parse YAML text; a syntax error is a :class:`UserError` that names the file and the line."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}, line {mark.line + 1}" if mark else name
        problem = getattr(error, "problem", None) or "not YAML"
        raise UserError(f"{where}: {problem}; fix the YAML there") from error
