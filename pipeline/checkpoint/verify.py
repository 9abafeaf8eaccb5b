"""Checks that the files of a checkpoint are what its manifest says."""

import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed

from common.errors import AgreedError, UserError
from common.files import sha256_file
from pipeline.checkpoint.store import MANIFEST, complete_tags, read_files, tags
from pipeline.distributed.process_group import Ranks
from pipeline.records.checkpoint import FileEntry


def damaged_files(folder: Path, names: Iterable[str] | None = None) -> list[str]:
    """Names of files that are missing or do not have the size and hash that the folder's manifest says.

    Args:
        folder: the checkpoint.
        names: files to check; None checks all.
    """
    try:
        files = read_files(folder)
    except UserError:
        return [MANIFEST]
    return [name for name in (files if names is None else names) if not _sound(folder / name, files[name])]


def damaged_weights(folder: Path) -> list[str]:
    """:func:`damaged_files` among a tag's weights: scoring and a later stage read nothing else."""
    return damaged_files(folder, weight_files(folder))


def weight_files(folder: Path) -> list[str] | None:
    """Names of the files that hold weights; None if the manifest can't be read."""
    try:
        return [name for name in read_files(folder) if name.endswith("model_states.pt")]
    except UserError:
        return None


def _sound(path: Path, entry: FileEntry) -> bool:
    try:
        return path.is_file() and path.stat().st_size == entry.bytes and sha256_file(path) == entry.sha256
    except OSError:
        return False


def damaged_on_any_node(folder: Path, ranks: Ranks, names: Sequence[str] | None = None) -> list[str]:
    """:func:`damaged_files` as any node sees them; on each node every file is read once, by one of its ranks."""
    if ranks.world_size == 1:
        return damaged_files(folder, names)
    hosts: list[Any] = [None] * ranks.world_size
    torch.distributed.all_gather_object(hosts, socket.gethostname())
    here = [rank for rank, host in enumerate(hosts) if host == hosts[ranks.rank]]
    try:
        wanted = sorted(read_files(folder) if names is None else names)
    except UserError:
        wanted = []
    mine = damaged_files(folder, wanted[here.index(ranks.rank) :: len(here)])
    bad: list[Any] = [None] * ranks.world_size
    torch.distributed.all_gather_object(bad, mine)
    return sorted({name for part in bad for name in part})


def check_sound(folder: Path, ranks: Ranks, fix: str, names: Sequence[str] | None = None) -> None:
    """Verify a folder on all ranks.

    Args:
        folder: the checkpoint.
        ranks: all of them take part.
        fix: what a user can do about a damaged file.
        names: files to check; None checks all.

    Raises:
        AgreedError: names the damaged files.
    """
    bad = damaged_on_any_node(folder, ranks, names)
    if bad:
        raise AgreedError(f"{folder}: {', '.join(bad)} damaged or missing; {fix}")


def newest_sound_tag(folder: Path, ranks: Ranks) -> tuple[str | None, list[str]]:
    """The newest tag whose files are all sound, if any, and one line per problem found on the way.

    A tag that was complete before its save was interrupted counts, whatever ``latest`` names.
    """
    found: list[Any] = [_candidates(folder) if ranks.is_first else None]
    if ranks.world_size > 1:
        torch.distributed.broadcast_object_list(found, src=0)
    candidates, complaints = found[0]
    for tag in candidates:
        bad = damaged_on_any_node(folder / tag, ranks)
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
