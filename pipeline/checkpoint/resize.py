"""A checkpoint for another number of ranks: the same weights and moments, divided differently."""

import mmap
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from common.errors import UserError
from common.files import fsync_path, link_or_copy, new_folder, write_text
from common.progress import progress
from pipeline.checkpoint.optimizer_state import SavedOptimizer
from pipeline.checkpoint.store import MANIFEST, complete_tags, read_files, read_manifest, write_manifest
from pipeline.checkpoint.tensors import (
    expert_file,
    file_entry,
    load_tensors,
    main_file,
    optimizer_file,
    save_tensors,
)
from pipeline.checkpoint.verify import damaged_files
from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.model.expert_plan import ExpertPlan
from pipeline.records.checkpoint import CheckpointManifest


def resize(folder: Path, dims: ParallelDims) -> Path:
    """Write a checkpoint again for other ranks, beside it: stepNNNNNN-ranksN-epM; ``latest`` then names it.

    Optimizer files are laid out on the disk and filled one parameter at a time, so memory does not grow with
    the model. Expert files are hard links to the same files.

    Args:
        folder: the checkpoint.
        dims: of the ranks that the new one is for.

    Returns:
        The new checkpoint's folder.

    Raises:
        UserError: the checkpoint is damaged.
    """
    read_files(folder)  # names damage
    try:
        manifest = read_manifest(folder, CheckpointManifest)
    except UserError as error:
        raise UserError(
            f"{folder}: is not a training checkpoint ({error}); name one such as runs/NAME/stage1/step000050"
        ) from error
    plan = ExpertPlan.model_validate(manifest.expert_plan)
    dims = replace(dims, max_imbalance=manifest.max_imbalance)
    bad = damaged_files(folder)
    if bad:
        raise UserError(f"{folder}: {', '.join(bad)} damaged or missing; resize an earlier checkpoint")
    target = folder.with_name(f"{folder.name.partition('-')[0]}-ranks{dims.world_size}-ep{dims.ep_size}")
    if (target / MANIFEST).is_file():
        raise UserError(f"{target}: exists already; delete it to write it again")
    with new_folder(target) as temporary:
        _link_experts(folder, temporary, plan)
        saved = SavedOptimizer(folder, plan, ParallelDims.that_saved(manifest))
        save_tensors(saved.main_for(dims), temporary / main_file())
        _write_optimizer(saved, temporary, dims)
        files = {path.name: file_entry(path) for path in sorted(temporary.iterdir())}
        fsync_path(temporary)
        changed = {"ranks": dims.world_size, "ep_size": dims.ep_size, "resized_from": folder.name, "files": files}
        write_manifest(temporary, manifest.model_copy(update=changed))
    if complete_tags(folder.parent)[0] == target.name:
        write_text(folder.parent / "latest", target.name)
    return target


def _link_experts(folder: Path, target: Path, plan: ExpertPlan) -> None:
    for moe_layer, layer in enumerate(plan.moe_layers):
        for number in range(plan.num_new[layer]):
            name = expert_file(moe_layer, number)
            if (folder / name).is_file():
                link_or_copy(folder / name, target / name)


def _write_optimizer(saved: SavedOptimizer, target: Path, dims: ParallelDims) -> None:
    if saved.of_routers.is_file():
        shutil.copyfile(saved.of_routers, target / saved.of_routers.name)
        return
    with progress(dims.world_size, "resize", "rank") as bar:
        for rank in range(dims.world_size):
            _write_rank(saved, target / optimizer_file(rank, bf16=saved.bf16), dims.at_rank(rank))
            bar.update(1)


def _write_rank(saved: SavedOptimizer, path: Path, dims: ParallelDims) -> None:
    """Lay out one rank's file without its data, then fill it through a shared mapping."""
    file = saved.file_for(dims, torch.empty)  # uses no memory until it is written to
    with torch.serialization.skip_data():
        torch.save(file, path)
    del file
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        state = load_tensors(path)
    saved.fill(state["optimizer_state_dict"], dims)
    del state
    fsync_path(path)
