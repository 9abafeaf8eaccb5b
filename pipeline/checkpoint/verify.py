"""Checks that the files of a checkpoint are what its manifest says."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch.distributed

from common.errors import AgreedError, UserError
from common.files import sha256_file
from pipeline.checkpoint.store import MANIFEST, complete_tags, read_files, tags
from pipeline.distributed.process_group import Ranks
from pipeline.records.checkpoint import FileEntry


def damaged_files(
    folder: Path, names: Iterable[str] | None = None, before: Callable[[str], object] = lambda _name: None
) -> list[str]:
    """Names of files that are missing or do not have the size and hash that the folder's manifest says.

    Args:
        folder: the checkpoint.
        names: files to check; None checks all.
        before: is called with each file's name before it is read.
    """
    try:
        files = read_files(folder)
    except UserError:
        return [MANIFEST]
    bad = []
    for name in files if names is None else names:
        before(name)
        if not _sound(folder / name, files[name]):
            bad.append(name)
    return bad


def weight_files(folder: Path) -> list[str] | None:
    """Names of the files that hold weights, all that scoring and a later stage read; None if there is no manifest."""
    try:
        return [name for name in read_files(folder) if name.endswith("model_states.pt")]
    except UserError:
        return None


def _sound(path: Path, entry: FileEntry) -> bool:
    try:
        return path.is_file() and path.stat().st_size == entry.bytes and sha256_file(path) == entry.sha256
    except OSError:
        return False


def damaged_on_any_rank(
    folder: Path, ranks: Ranks, names: Iterable[str] | None = None, loads: Iterable[str] = ()
) -> list[str]:
    """:func:`damaged_files` as any rank sees them: each file is read by one of the ranks, and by those that load it.

    Args:
        folder: the checkpoint.
        ranks: all of them take part.
        names: files to check; None checks all.
        loads: files that this rank is going to load.
    """

    def heartbeat(name: str) -> None:
        ranks.at(f"verifying {folder.name}/{name}")

    if ranks.world_size == 1:
        return damaged_files(folder, names, heartbeat)
    try:
        files = read_files(folder)
    except UserError:
        files = {}
    wanted = sorted(files.keys() & (files if names is None else names), key=lambda name: (-files[name].bytes, name))
    mine = {*wanted[ranks.rank :: ranks.world_size], *(name for name in loads if name in wanted)}
    bad: list[Any] = [None] * ranks.world_size
    torch.distributed.all_gather_object(bad, damaged_files(folder, sorted(mine), heartbeat))
    return sorted({name for part in bad for name in part})


def check_sound(
    folder: Path, ranks: Ranks, fix: str, names: Iterable[str] | None = None, loads: Iterable[str] = ()
) -> None:
    """Verify a folder on all ranks.

    Args:
        folder: the checkpoint.
        ranks: all of them take part.
        fix: what a user can do about a damaged file.
        names: files to check; None checks all.
        loads: files that this rank is going to load.

    Raises:
        AgreedError: names the damaged files.
    """
    bad = damaged_on_any_rank(folder, ranks, names, loads)
    if bad:
        raise AgreedError(f"{folder}: {', '.join(bad)} damaged or missing; {fix}")


def newest_sound_tag(folder: Path, ranks: Ranks, loads: Iterable[str] = ()) -> tuple[str | None, list[str]]:
    """The newest tag whose files are all sound, if any, and one line per problem found on the way.

    A tag that was complete before its save was interrupted counts, whatever ``latest`` names.

    Args:
        folder: of the stage.
        ranks: all of them take part.
        loads: files of a tag that this rank is going to load.
    """
    candidates, complaints = ranks.agreed(_candidates(folder) if ranks.is_first else None)
    for tag in candidates:
        bad = damaged_on_any_rank(folder / tag, ranks, loads=loads)
        if not bad:
            return tag, complaints
        complaints.append(f"{folder / tag}: {', '.join(bad)} damaged or missing; using an earlier checkpoint")
    return None, complaints


def _candidates(folder: Path) -> tuple[list[str], list[str]]:
    """Complete tags, newest first, and one line per problem of the others and of ``latest``."""
    complete = complete_tags(folder)
    complaints = [
        f"{folder / tag / MANIFEST}: missing, so this checkpoint was not finished; using an earlier one"
        for tag in tags(folder)
        if tag not in complete
    ]
    if complete:
        latest = folder / "latest"
        try:
            named = latest.read_text(encoding="utf-8", errors="replace").strip() if latest.is_file() else None
        except OSError:
            named = None
        if named is None:
            complaints.append(f"{latest}: missing; using the newest complete checkpoint")
        elif named not in complete:
            complaints.append(f"{latest}: names {named!r}, which is not a complete checkpoint; using the newest one")
    return complete, complaints
