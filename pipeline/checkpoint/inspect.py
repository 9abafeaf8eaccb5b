"""What a checkpoint is and whether it is sound, found without loading a model."""

from pathlib import Path
from typing import Any

from common.errors import UserError
from pipeline.checkpoint.store import MANIFEST, complete_tags, read_manifest
from pipeline.checkpoint.verify import damaged_files
from pipeline.model.expert_plan import ExpertPlan

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
    files = read_manifest(folder)["files"]
    return f"{folder}: sound ({len(files)} files, {sum(e['bytes'] for e in files.values()) / 1e9:.2f} GB)"


def inspect_text(folder: Path) -> str:
    """Step, samples, ranks, plan, ancestry and sizes, one per line."""
    manifest = read_manifest(folder)
    plan = ExpertPlan.model_validate(manifest.get("expert_plan") or manifest["plan"])
    rows: list[tuple[str, Any]] = [("checkpoint", folder)]
    for key in ("stage", "step", "samples", "ranks", "ep_size", "resized_from", "dtype", "best_value"):
        if key in manifest:
            rows.append((key.replace("_", " "), manifest[key]))
    if "skipped_steps" in manifest:
        rows.append(("skipped steps", manifest["skipped_steps"]["count"]))
    if "stage1" in manifest:
        rows.append(("experts from", f"stage1/{manifest['stage1']['tag']}"))
    rows.append(("model", manifest["model"]))
    rows.append(("experts", f"{sum(plan.counts)} ({sum(plan.num_new)} new), top {plan.top_k}, by layer:"))
    rows.append(("", " ".join(map(str, plan.counts))))
    rows.append(("classifiers", " ".join(map(str, plan.classifier_layers)) or "none"))
    for number, round_ in enumerate(plan.rounds):
        languages = " ".join(round_.languages) or "-"
        rows.append((f"round {number}", f"{languages}: {sum(round_.num_new)} experts from {round_.source}"))
    rows += _sizes(manifest["files"])
    return "\n".join(f"{name:22}{value}" for name, value in rows)


def _sizes(files: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    rows = []
    for kind, (start, end) in _KINDS.items():
        sizes = [e["bytes"] for name, e in files.items() if _is_of(name, start, end)]
        if sizes:
            rows.append((kind, f"{sum(sizes) / 1e9:.3f} GB in {len(sizes)} files"))
    return [*rows, ("in all", f"{sum(e['bytes'] for e in files.values()) / 1e9:.3f} GB in {len(files)} files")]


def _is_of(name: str, start: str, end: str) -> bool:
    base = name.rpartition("/")[2]
    return base.startswith(start) and base.endswith(end)
