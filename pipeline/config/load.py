"""A run's YAML as a RunConfig."""

from pathlib import Path
from typing import Any

from common.settings import load_settings, parse_settings
from pipeline.config.run import RunConfig


def load_run(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a run's YAML, apply ``key.sub=value`` overrides, and check all of it.

    Raises:
        UserError: one line for each mistake, naming the file, the key, the value and the fix.
    """
    return load_settings(RunConfig, path, overrides)


def parse_run(tree: dict[str, Any], name: str) -> RunConfig:
    """Check a run's settings, given as nested dicts; ``name`` says in errors where they came from.

    Raises:
        UserError: one line for each mistake.
    """
    return parse_settings(RunConfig, tree, name)
