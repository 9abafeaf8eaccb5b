"""A run's YAML as a RunConfig."""

from pathlib import Path

from common.settings import load_settings
from pipeline.config.run import RunConfig


def load_run(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a run's YAML, apply ``key.sub=value`` overrides, and check all of it.

    Raises:
        UserError: one line for each mistake, naming the file, the key, the value and the fix.
    """
    return load_settings(RunConfig, path, overrides)
