"""Stage 1 that another run of a sweep has trained with the same inputs: linked, instead of trained again."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common.errors import UserError, one_line
from common.files import content_key, link_or_copy, new_folder
from pipeline.config.run import RunConfig
from pipeline.records.run_folder import SHARED_STAGE_FILE, VALIDATION_BASE_FILE, RunFolder
from pipeline.records.shared_stage import SharedStage
from pipeline.records.step_manifest import StepInputs, StepManifest

STAGE = "stage1"
# What stage 1's result does not depend on. Its inputs decide; these say only which runs to wait for.
_AFTERWARDS: Any = {"name": True, "stage2": True, "evaluate": True, "experts": {"classifier_layers", "classifier"}}


def trainers(runs: Iterable[RunConfig]) -> dict[str, RunConfig]:
    """By name, the first run before it that may train the same stage 1; none of a run that is the first itself."""
    first: dict[str, RunConfig] = {}
    found = {}
    for run in runs:
        trainer = first.setdefault(content_key(run.model_dump(mode="json", exclude=_AFTERWARDS)), run)
        if trainer is not run:
            found[run.name] = trainer
    return found


def share_stage(run: RunConfig, trainer: RunConfig | None) -> None:
    """Write into a run's folder which run trains stage 1 for it; None if it does so itself."""
    path = run.folder / SHARED_STAGE_FILE
    if trainer is None:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    SharedStage(trained_by=str(trainer.folder)).save(path)


def take_shared_stage(folder: RunFolder, done_with: StepInputs) -> StepManifest | None:
    """Stage 1 from the run that trains it for this one, if that has done so with the same inputs.

    Checkpoints are hard links to the same files, which nothing changes in place; other files are copies.

    Args:
        folder: of the run that needs it.
        done_with: what its stage 1 is done with.

    Returns:
        The other run's manifest of the step; None if there is nothing to take.

    Raises:
        UserError: a file of the other run is damaged, or its checkpoints can be neither linked nor copied.
    """
    shared = SharedStage.load_if_there(folder / SHARED_STAGE_FILE)
    other = RunFolder(Path(shared.trained_by)) if shared is not None else None
    if other is None or not other.has_manifest(STAGE):
        return None
    manifest = other.manifest(STAGE)
    checkpoint = other / STAGE / manifest.outputs["checkpoint"]
    if manifest.done_with.inputs != done_with.inputs or not checkpoint.is_dir():
        return None
    try:
        _take(other, folder)
    except OSError as error:
        raise UserError(
            f"{folder / STAGE}: can't be linked from {other / STAGE} ({one_line(error)}); see that the disk has room "
            "and that both can be read"
        ) from error
    print(f"{STAGE}: the same as {other.path}'s, whose checkpoints are linked", flush=True)
    return manifest


def _take(other: RunFolder, folder: RunFolder) -> None:
    with new_folder(folder / STAGE) as new:
        for path in (other / STAGE).iterdir():
            if not path.is_dir():
                shutil.copyfile(path, new / path.name)
                continue
            (new / path.name).mkdir()  # a checkpoint, which has no folders
            for file in path.iterdir():
                link_or_copy(file, new / path.name / file.name)
    if (other / VALIDATION_BASE_FILE).is_file():  # its key says of what, and stage 1 alone could write it
        shutil.copyfile(other / VALIDATION_BASE_FILE, folder / VALIDATION_BASE_FILE)
