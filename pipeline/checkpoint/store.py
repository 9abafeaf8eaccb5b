"""A folder of checkpoints: saves one, marks the best, keeps the newest."""

import errno
import json
import shutil
import time
from pathlib import Path
from typing import Any, TypeVar

from deepspeed import comm as dist

from common.errors import AgreedError, UserError
from common.files import content_key, fsync_path, json_text, write_json, write_text
from pipeline.records.checkpoint import CheckpointIdentity, CheckpointManifest, FileEntry, Manifest
from pipeline.records.metrics import Best
from pipeline.records.run_folder import BEST_FILE

MANIFEST = "manifest.json"
_CHECKSUM = "checksum"
M = TypeVar("M", bound=Manifest)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a folder's manifest, with a checksum of itself."""
    content = manifest.model_dump(mode="json")
    write_json(folder / MANIFEST, {**content, _CHECKSUM: content_key(content)})


def read_manifest(folder: Path, kind: type[M]) -> M:
    """Read a folder's manifest.

    Args:
        folder: of the weights.
        kind: which manifest it is to be.

    Raises:
        UserError: it is missing, damaged or of another kind.
    """
    return kind.parse(_read_checked(folder), str(folder / MANIFEST))


def read_files(folder: Path) -> dict[str, FileEntry]:
    """The files that a folder's manifest names, whatever its kind.

    Raises:
        UserError: it is missing or damaged.
    """
    return Manifest.parse({"files": _read_checked(folder)["files"]}, str(folder / MANIFEST)).files


def _read_checked(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{path}: does not exist, so {folder} is not a complete checkpoint; use another one")
    try:
        text = path.read_text(encoding="utf-8")
        manifest = json.loads(text)
        sound = text == json_text(manifest)  # to the byte
        sound = manifest.pop(_CHECKSUM) == content_key(manifest) and sound
    except (OSError, ValueError, AttributeError, KeyError):
        sound = False
    if not sound:
        raise UserError(f"{path}: damaged, so the checkpoint can't be trusted; use another one")
    return dict(manifest)


def save_checkpoint(engine: Any, folder: Path, tag: str, manifest: CheckpointManifest, keep: int) -> dict[str, float]:
    """Save on all ranks: files, then the manifest, then ``latest``. Then delete checkpoints that are no longer kept.

    Args:
        engine: DeepSpeed's, with an :class:`AtomicCheckpointEngine`.
        folder: of the stage's checkpoints.
        tag: the new one's name.
        manifest: what the checkpoint is of; ``files``, with sizes and hashes, is added.
        keep: how many of the newest to keep, besides the best.

    Returns:
        How long it took (``seconds``) and how large it is (``gigabytes``).

    Raises:
        AgreedError: a rank could not write. The unfinished checkpoint is deleted, earlier ones are unchanged.
    """
    started = time.monotonic()
    files = engine.checkpoint_engine
    files.files.clear()
    files.error = None
    if dist.get_rank() == 0:
        _remove_incomplete(folder)
        _remove(folder / tag)
    dist.barrier()
    engine.save_checkpoint(str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=True)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (files.files, _line(files.error)))
    complete = {name: entry for part, _ in gathered for name, entry in part.items()}
    problem = [next((line for _, line in gathered if line), None)]
    if dist.get_rank() == 0 and problem[0] is None:
        try:
            fsync_path(folder / tag)
            write_manifest(folder / tag, manifest.model_copy(update={"files": dict(sorted(complete.items()))}))
            write_text(folder / "latest", tag)
            prune(folder, tag, keep)
        except OSError as error:
            problem = [_line(error)]
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        if dist.get_rank() == 0:
            _remove(folder / tag)
        dist.barrier()
        raise AgreedError(
            f"{folder / tag}: can't be written ({problem[0]}); checkpoints before it are unchanged; free some space, "
            "and check that the folder can be written"
        )
    size = sum(entry.bytes for entry in complete.values())
    return {"seconds": time.monotonic() - started, "gigabytes": size / 1e9}


def _line(error: OSError | None) -> str | None:
    if error is None:
        return None
    return "the disk is full" if error.errno == errno.ENOSPC else str(error)


def mark_best(folder: Path, tag: str, value: float) -> None:
    """Note the best checkpoint so far, and its bits per character."""
    Best(tag=tag, bits_per_character=value).save(folder / BEST_FILE)


def best(folder: Path) -> Best | None:
    """The best checkpoint; None if none was marked."""
    try:
        return Best.load_if_there(folder / BEST_FILE)
    except UserError:
        return None  # a damaged file counts as none


def tags(folder: Path) -> list[str]:
    """All tags, complete or not, the highest step first."""
    if not folder.is_dir():
        return []
    return sorted((path.name for path in folder.glob("step*") if path.is_dir()), reverse=True)


def complete_tags(folder: Path) -> list[str]:
    """The tags that have a manifest, the highest step first."""
    return [tag for tag in tags(folder) if (folder / tag / MANIFEST).is_file()]


def prune(folder: Path, newest: str, keep: int) -> None:
    """Delete all but ``newest``, the ``keep`` - 1 before it, the best, and those whose experts another stage uses.

    A checkpoint of a later step than ``newest`` is deleted too: it was damaged, so training resumed from before it.
    """
    kept = [tag for tag in complete_tags(folder) if tag <= newest][:keep]
    protected = {*kept, *_referred_to(folder)}
    marked = best(folder)
    if marked:
        protected.add(marked.tag)
    for tag in complete_tags(folder):
        if tag not in protected:
            _remove(folder / tag)


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint, its manifest first: an interrupted deletion leaves no complete one."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def _referred_to(folder: Path) -> set[str]:
    """The tags of a stage whose experts another stage's checkpoints use: their manifests name it."""
    found: set[str] = set()
    for other in folder.parent.iterdir():
        for tag in complete_tags(other) if other != folder and folder.name == "stage1" else ():
            try:
                experts = read_manifest(other / tag, CheckpointManifest).identity.stage1
            except UserError:
                continue
            found.update({experts.tag} if experts else ())
    return found


def _remove_incomplete(folder: Path) -> None:
    """Delete what an interrupted save left."""
    for tag in tags(folder):
        if not (folder / tag / MANIFEST).is_file():
            shutil.rmtree(folder / tag, ignore_errors=True)


def check_same_run(found: CheckpointIdentity, expected: CheckpointIdentity, where: Path) -> None:
    """Refuse a checkpoint of another model, plan or tokenizer.

    Args:
        found: what the checkpoint is of.
        expected: what this run's are of.
        where: the checkpoint.

    Raises:
        AgreedError: names what differs.
    """
    for key, what in (("model", "model"), ("plan", "expert plan"), ("tokenizer", "tokenizer")):
        theirs, ours = getattr(found, key), getattr(expected, key)
        if theirs != ours:
            raise AgreedError(
                f"{where}: is a checkpoint of another {what} ({theirs}, this run has {ours}); "
                "give the run another name, or delete its stage folders"
            )
