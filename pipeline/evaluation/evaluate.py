"""Bits per character of the base model and of each checkpoint, and how their tokens are routed."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from common.errors import UserError
from data_prep.store import TokenStore
from pipeline import checkpoint
from pipeline.config.run import RunConfig
from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.distributed.process_group import Ranks
from pipeline.evaluation.scoring import SetScore, score_set
from pipeline.method.upcycle import load_upcycled
from pipeline.model.backbone import load_dense, moe_layers, move
from pipeline.model.expert_plan import ExpertPlan

BASE = "base"


def checkpoint_folder(stage_folders: dict[str, Path], tag: str) -> Path:
    """The folder of a checkpoint that a user names: STAGE (its last), STAGE/best, or STAGE/stepNNNNNN.

    Raises:
        UserError: there is no such checkpoint, or it is damaged.
    """
    stage, _, which = tag.partition("/")
    if stage not in stage_folders:
        raise UserError(f"--checkpoint {tag}: unknown; use base, stage1, stage2, stage1/best or stage1/step000050")
    folder = stage_folders[stage]
    tags = checkpoint.complete_tags(folder)
    if which == "best":
        marked = checkpoint.best(folder)
        which = marked["tag"] if marked else "best"
    elif not which:
        which = tags[0] if tags else "any"
    if which not in tags:
        raise UserError(f"--checkpoint {tag}: {folder} holds no complete checkpoint {which}; it has {tags or 'none'}")
    bad = checkpoint.damaged_weights(folder / which)
    if bad:
        raise UserError(f"--checkpoint {tag}: {folder / which}: {', '.join(bad)} damaged or missing; choose of {tags}")
    return folder / which


def load_checkpoint(
    run: RunConfig, plan: ExpertPlan, upcycled: Path, tags: list[Path], dtype: torch.dtype, ranks: Ranks
) -> nn.Module:
    """The upcycled model with the weights of the given checkpoints laid over it, later ones last."""
    dims = ParallelDims(ranks.world_size, run.parallel.ep_size, ranks.rank)
    stage2 = any(tag.parent.name == "stage2" for tag in tags)
    model = load_upcycled(upcycled, plan, dtype, dims, classifiers=stage2)
    for tag in tags:
        checkpoint.read_weights(model, tag)
    move(model, ranks.device)
    if dims.ep_size > 1:
        for layer in moe_layers(model):
            layer.set_deepspeed_parallelism()
    return model.eval()


def score_all(run: RunConfig, store: TokenStore, model: nn.Module, ranks: Ranks, label: str) -> dict[str, SetScore]:
    """Every set's held-out documents."""
    scores = {}
    for name in run.data.sets:
        scores[name] = score_set(model, store, name, ranks, window=run.evaluate.window)
        ranks.say(f"evaluate: {label:12} {name:12} {scores[name].bits_per_character:.4f} bits/char")
    return scores


def evaluate_models(
    run: RunConfig,
    plan: ExpertPlan,
    store: TokenStore,
    *,
    dense: Path,
    upcycled: Path,
    checkpoints: dict[str, list[Path]],
    dtype: torch.dtype,
    ranks: Ranks,
) -> dict[str, Any]:
    """Score the base model, then each checkpoint.

    Args:
        checkpoints: for each label, the checkpoints to lay over the upcycled model.

    Returns:
        What ``evaluation.json`` holds.
    """
    model: nn.Module = load_dense(dense, dtype, ranks.device)
    scores = {BASE: score_all(run, store, model, ranks, BASE)}
    del model
    for label, tags in checkpoints.items():
        model = load_checkpoint(run, plan, upcycled, tags, dtype, ranks)
        scores[label] = score_all(run, store, model, ranks, label)
        del model
    return {
        "window": run.evaluate.window,
        "checkpoints": list(scores),
        "sets": {
            name: _set_summary(run, store, name, {k: v[name] for k, v in scores.items()}) for name in run.data.sets
        },
        "routing": {label: _routing(plan, scores[label]) for label in checkpoints},
    }


def _set_summary(run: RunConfig, store: TokenStore, name: str, scores: dict[str, SetScore]) -> dict[str, Any]:
    base = scores[BASE]
    return {
        "group": run.data.group(name),
        "language": run.data.sets[name].language,
        "documents": len(base.characters),
        "characters": int(base.characters.sum()),
        "bits_per_character": {label: score.bits_per_character for label, score in scores.items()},
        "change": {
            label: dict(zip(("percent", "interval"), paired_change(base.bits, score.bits), strict=True))
            for label, score in scores.items()
            if label != BASE
        },
        "bits_by_document": {label: [round(float(b), 3) for b in score.bits] for label, score in scores.items()},
        "pages": [document.page for document in store.held_out_documents(name)],
    }


def _routing(plan: ExpertPlan, scores: dict[str, SetScore]) -> dict[str, Any]:
    sets = {
        name: {
            "share_0": score.expert_0_share,
            "probability_0": score.probability_0,
            "classified_old": score.classified_old,
        }
        for name, score in scores.items()
    }
    return {"layers": list(plan.moe_layers), "sets": sets}


def paired_change(before: np.ndarray, after: np.ndarray) -> tuple[float, float | None]:
    """The change of total bits in percent, and the half-width of its 95 % interval over documents.

    The interval is that of a ratio of sums over paired documents (the delta method): documents vary
    much more than a document's two scores do. None for a single document.

    Args:
        before, after: [documents] bits of the same documents.
    """
    ratio = float(after.sum() / before.sum())
    n = len(before)
    if n < 2:
        return 100 * (ratio - 1), None
    residuals = after - ratio * before
    error = math.sqrt(n / (n - 1) * float((residuals**2).sum())) / float(before.sum())
    return 100 * (ratio - 1), 100 * 1.96 * error
