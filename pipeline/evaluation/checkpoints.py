"""Which checkpoints are scored, found by the names that users give them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from common.errors import UserError
from common.files import sha256_file
from pipeline.checkpoint.store import MANIFEST, best, check_same_run, complete_tags, read_manifest
from pipeline.checkpoint.verify import check_sound, weight_files
from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.distributed.process_group import Ranks
from pipeline.method.stages import STAGES
from pipeline.method.untrained import Untrained, UntrainedMixture
from pipeline.model.backbone import ONE_RANK, load_dense, moe_layers, move
from pipeline.model.expert_plan import ExpertPlan
from pipeline.records.checkpoint import CheckpointIdentity, CheckpointManifest


@dataclass(frozen=True)
class Scored:
    """A model to score.

    Attributes:
        label: its name in tables: "base", "stage1", "stage2/best" …
        folders: the checkpoints to lay over the untrained model, later ones last; none for the dense model, nor for
            one that was imported.
        weights: what names its weights: hashes, as JSON holds them.
        has_classifiers: whether its routing classifiers have been trained.
        untrained: what the checkpoints are laid over; None for the dense model.
        by_own_tokenizer: whether text is given to it by the dense model's own tokenizer, where the run's extends it.
    """

    label: str
    folders: tuple[Path, ...]
    weights: Any
    has_classifiers: bool = False
    untrained: Untrained | None = None
    by_own_tokenizer: bool = False

    @property
    def plan(self) -> ExpertPlan | None:
        """Of a mixture's experts; None for a dense model."""
        return self.untrained.plan if isinstance(self.untrained, UntrainedMixture) else None


def find_checkpoint(stage_folders: dict[str, Path], tag: str) -> Path:
    """The folder of a checkpoint that a user names: STAGE (its last), STAGE/best, or STAGE/stepNNNNNN.

    Args:
        stage_folders: by stage1 and stage2.
        tag: what the user wrote.

    Raises:
        UserError: there is no such checkpoint.
    """
    stage, _, which = tag.partition("/")
    if stage not in stage_folders:
        raise UserError(f"--checkpoint {tag}: unknown; use base, stage1, stage2, stage1/best or stage1/step000050")
    folder = stage_folders[stage]
    tags = complete_tags(folder)
    if which == "best":
        marked = best(folder)
        which = marked.tag if marked else "best"
    elif not which:
        which = tags[0] if tags else "any"
    if which not in tags:
        raise UserError(f"--checkpoint {tag}: {folder} holds no complete checkpoint {which}; it has {tags or 'none'}")
    return folder / which


def checkpoint_to_score(
    stage_folders: dict[str, Path],
    label: str,
    identities: dict[int, CheckpointIdentity],
    untrained: Untrained,
) -> Scored:
    """A checkpoint with the one of stage 1 that holds its experts.

    Args:
        stage_folders: by stage1 and stage2.
        label: what the user calls it.
        identities: by the stage's number, what its checkpoints must be of.
        untrained: what it is laid over.

    Raises:
        UserError: it is missing, or of another model, plan, tokenizer or stage 1.
    """
    folder = find_checkpoint(stage_folders, label)
    manifest = read_manifest(folder, CheckpointManifest)
    check_same_run(manifest.identity, identities[manifest.stage], folder)
    folders = [folder]
    if manifest.identity.stage1 is not None:
        experts = find_checkpoint(stage_folders, f"stage1/{manifest.identity.stage1.tag}")
        if sha256_file(experts / MANIFEST) != manifest.identity.stage1.manifest:
            raise UserError(f"{folder}: was trained on another {experts} than lies there now; train stage 2 again")
        folders.insert(0, experts)
    hashes = [sha256_file(path / MANIFEST) for path in folders]
    weights = {**untrained.key, "checkpoints": hashes}
    return Scored(label, tuple(folders), weights, STAGES[manifest.stage].has_classifiers, untrained)


def check_weights(scored: Scored, ranks: Ranks) -> None:
    """Verify the checkpoints of a model, or an imported model that has none; the ranks share the files.

    Raises:
        AgreedError: names the damaged files.
    """
    if not scored.folders and scored.untrained is not None:
        scored.untrained.check(ranks, ONE_RANK)
    for folder in scored.folders:
        fix = f"name another checkpoint, such as {folder.parent.name}/best, or train {folder.parent.name} again"
        check_sound(folder, ranks, fix, weight_files(folder))


def load_scored(scored: Scored, dense: Path, dtype: torch.dtype, ranks: Ranks, dims: ParallelDims) -> PreTrainedModel:
    """A model on the ranks' device, verified: the dense one where nothing else is laid over.

    Raises:
        AgreedError: names the damaged files.
    """
    if scored.untrained is None:
        return load_dense(dense, dtype, ranks.device)
    check_weights(scored, ranks)
    return load_model(scored, scored.untrained, dtype, dims, ranks.device)


def load_model(
    scored: Scored, untrained: Untrained, dtype: torch.dtype, dims: ParallelDims, device: torch.device
) -> PreTrainedModel:
    """The untrained model with a checkpoint's weights, each rank with its own experts, ready to score.

    On a CPU the checkpoint's files, mapped into memory, are the weights: a node's ranks share them.
    What it reads must have been verified: see :func:`check_weights`.
    """
    model = untrained.load(
        dtype, dims, checkpoints=scored.folders, classifiers=scored.has_classifiers, reading="mapped"
    )
    move(model, device)
    if dims.ep_size > 1:
        for layer in moe_layers(model):
            layer.set_deepspeed_parallelism()
    return model.eval()
