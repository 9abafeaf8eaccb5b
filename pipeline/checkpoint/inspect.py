"""What a checkpoint is and whether it is sound, found without loading a model."""

from pathlib import Path
from typing import Any

from common.errors import UserError
from pipeline.checkpoint.store import MANIFEST, complete_tags, read_files, read_manifest
from pipeline.checkpoint.verify import damaged_files
from pipeline.model.expert_plan import ExpertPlan
from pipeline.records.checkpoint import CheckpointManifest, FileEntry, UpcycledManifest

_KINDS = {
    "experts": ("layer_", "_model_states.pt"),
    "routers and the rest": ("mp_rank_", "_model_states.pt"),
    "optimizer": ("", "_optim_states.pt"),
}


def find_tag(path: Path) -> Path:
    """The folder of the checkpoint that a user names: a tag's, an upcycled one's, or a stage's (its newest tag).

    Raises:
        UserError: there is none.
    """
    if (path / MANIFEST).is_file():
        return path
    complete = complete_tags(path)
    if not complete:
        raise UserError(
            f"{path}: holds no complete checkpoint (no {MANIFEST}); name one such as runs/NAME/stage1/step000050"
        )
    return path / complete[0]


def verify_text(folder: Path) -> str:
    """One line that says that the checkpoint is sound.

    Raises:
        UserError: it is not; the line names the files.
    """
    bad = damaged_files(folder)
    if bad:
        raise UserError(f"{folder}: {', '.join(bad)} damaged or missing; use an earlier checkpoint")
    return f"{folder}: sound ({_size(read_files(folder))})"


def inspect_text(folder: Path) -> str:
    """Step, samples, ranks, plan, ancestry and sizes, one per line."""
    rows: list[tuple[str, Any]] = [("checkpoint", folder)]
    try:
        manifest = read_manifest(folder, CheckpointManifest)
    except UserError:
        upcycled = read_manifest(folder, UpcycledManifest)
        rows += [
            ("dtype", upcycled.dtype),
            ("model", upcycled.model),
            *_plan(ExpertPlan.model_validate(upcycled.plan)),
        ]
        return _text(rows + _sizes(upcycled.files))
    for key in ("stage", "step", "samples", "ranks", "ep_size", "resized_from", "best_value"):
        if getattr(manifest, key) is not None:
            rows.append((key.replace("_", " "), getattr(manifest, key)))
    rows.append(("skipped steps", manifest.skipped_steps["count"]))
    if manifest.identity.stage1 is not None:
        rows.append(("experts from", f"stage1/{manifest.identity.stage1.tag}"))
    rows.append(("model", manifest.identity.model))
    if manifest.method == "moe":
        rows += _plan(ExpertPlan.model_validate(manifest.expert_plan))
    else:
        rows.append(("method", manifest.method))
    return _text(rows + _sizes(manifest.files))


def _plan(plan: ExpertPlan) -> list[tuple[str, Any]]:
    rows = [
        ("experts", f"{sum(plan.counts)} ({sum(plan.num_new)} new), top {plan.top_k}, by layer:"),
        ("", " ".join(map(str, plan.counts))),
        ("classifiers", " ".join(map(str, plan.classifier_layers)) or "none"),
    ]
    for number, round_ in enumerate(plan.rounds):
        languages = " ".join(round_.languages) or "-"
        rows.append((f"round {number}", f"{languages}: {sum(round_.num_new)} experts from {round_.source}"))
    return rows


def _sizes(files: dict[str, FileEntry]) -> list[tuple[str, Any]]:
    kinds = {
        kind: {name: entry for name, entry in files.items() if _is_of(name, start, end)}
        for kind, (start, end) in _KINDS.items()
    }
    return [*((kind, _size(found)) for kind, found in kinds.items() if found), ("in all", _size(files))]


def _size(files: dict[str, FileEntry]) -> str:
    return f"{sum(entry.bytes for entry in files.values()) / 1e9:.3f} GB in {len(files)} files"


def _text(rows: list[tuple[str, Any]]) -> str:
    return "\n".join(f"{name:22}{value}" for name, value in rows)


def _is_of(name: str, start: str, end: str) -> bool:
    base = name.rpartition("/")[2]
    return base.startswith(start) and base.endswith(end)
