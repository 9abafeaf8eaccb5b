"""The verb ``import``: an exported folder as the base of further expansions."""

from pathlib import Path

from pipeline.export.import_folder import import_folder
from pipeline.export.read import read_expansion


def import_exported(source: Path, to: Path | None) -> None:
    """Import a folder, and say how to go on.

    Args:
        source: the exported folder.
        to: the folder to make; runs/NAME-imported without it, NAME being the run that was exported.

    Raises:
        UserError: see :func:`pipeline.export.import_folder.import_folder`.
    """
    target = to or Path("runs") / f"{read_expansion(source).run}-imported"
    expansion = import_folder(source, target)
    print(
        f"import: {expansion.checkpoint} of {expansion.run} as {target}; in a run's YAML: base: {target}", flush=True
    )
