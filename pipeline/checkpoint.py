"""Checkpoints in DeepSpeed-MoE's native layout, written atomically, verified when read.

A folder of checkpoints holds a folder a tag, ``latest`` and ``best``. A tag is complete when its
``manifest.json`` is there: it is written last, with every file's size and sha256. A checkpoint holds what
trained; the frozen weights lie in the upcycled checkpoint, and a stage-2 checkpoint names the stage-1
checkpoint that holds its experts.

Expert files are numbered by the model: file 0 is the layer's first new expert. DeepSpeed numbers them by
rank and slot; the checkpoint engine below translates.
"""

import os
import pickle
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.files import fsync_path, read_json, sha256_file, write_json, write_text
from pipeline.model import moe_layers
from pipeline.moe import MoELayer

MANIFEST = "manifest.json"
_EXPERT_FILE = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_00_model_states\.pt$")
_EXPERT_KEY = re.compile(r"(\.deepspeed_experts\.)(\d+)(\.)")


def main_file() -> str:
    """The file of everything that is not an expert."""
    return "mp_rank_00_model_states.pt"


def expert_file(moe_layer: int, number: int) -> str:
    """The file of one new expert; ``moe_layer`` counts layers with a router, ``number`` new experts from 0."""
    return f"layer_{moe_layer}_expert_{number}_mp_rank_00_model_states.pt"


def save_tensors(value: Any, path: Path) -> None:
    """torch.save under a temporary name, synced, renamed."""
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    torch.save(value, temporary)
    fsync_path(temporary)
    os.replace(temporary, path)


def load_tensors(path: Path) -> Any:
    """Read what :func:`save_tensors` wrote, mapped rather than copied; runs no code from the file."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise UserError(f"{path}: can't be read as a checkpoint file ({str(error).splitlines()[0]})") from error


def local_expert_names(model: nn.Module) -> dict[tuple[int, int], str]:
    """For each (MoE layer, file number) on this rank, the prefix of the expert's parameters in the model."""
    prefixes = {layer: name for name, layer in model.named_modules() if isinstance(layer, MoELayer)}
    result = {}
    for index, layer in enumerate(moe_layers(model)):
        numbers = layer.local_numbers
        for slot, number in enumerate(numbers):
            result[index, number - 1] = f"{prefixes[layer]}.deepspeed_moe.experts.deepspeed_experts.{slot}"
    return result


@torch.no_grad()
def read_weights(model: nn.Module, folder: Path) -> set[str]:
    """Copy a tag's weights into the model: everything shared, and this rank's experts if the tag has them.

    Returns:
        Names of the model's parameters and persistent buffers that the tag did not hold.

    Raises:
        UserError: a file can't be read, or a weight has another shape.
    """
    persistent = model.state_dict().keys()
    target: dict[str, Tensor] = {name: tensor for name, tensor in model.named_buffers() if name in persistent}
    target.update(model.named_parameters())
    missing = set(target)

    def copy(name: str, tensor: Tensor, path: Path) -> None:
        if name not in target:
            raise UserError(
                f"{path}: holds {name}, which this model does not have; it is a checkpoint of another model"
            )
        if target[name].shape != tensor.shape:
            raise UserError(
                f"{path}: {name} has shape {list(tensor.shape)}, but the model's has {list(target[name].shape)}; "
                "it is a checkpoint of another model or plan"
            )
        target[name].copy_(tensor)
        missing.discard(name)

    path = folder / main_file()
    if not path.is_file():
        raise UserError(f"{path}: does not exist; the checkpoint is not complete")
    for name, tensor in load_tensors(path)["module"].items():
        copy(name, tensor, path)
    for (layer, number), prefix in local_expert_names(model).items():
        path = folder / expert_file(layer, number)
        if path.is_file():
            for name, tensor in load_tensors(path).items():
                copy(f"{prefix}.{name.rsplit('.', 1)[1]}", tensor, path)
    return missing


class AtomicCheckpointEngine(TorchCheckpointEngine):
    """DeepSpeed's seam for how files are written: atomically, hashed, and only what trained.

    Args:
        model: the engine's module.
    """

    def __init__(self, config: Any, model: nn.Module) -> None:
        super().__init__(config)
        self.layers = moe_layers(model)
        self.trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.files: dict[str, dict[str, Any]] = {}

    def save(self, state_dict: Any, path: str) -> None:
        """Write one file; frozen experts and empty slots have none."""
        target = Path(path)
        match = _EXPERT_FILE.search(path)
        if match:
            layer, number = int(match[1]), self._file_number(int(match[1]), int(match[2]))
            if number is None or not self.layers[layer].experts_train:
                return
            target = target.with_name(expert_file(layer, number))
            state_dict = _renumber(state_dict, number)
        elif "module" in state_dict:
            module = {name: tensor for name, tensor in state_dict["module"].items() if name in self.trained}
            state_dict = {**state_dict, "module": module}
        save_tensors(state_dict, target)
        self.files[target.name] = {"bytes": target.stat().st_size, "sha256": sha256_file(target)}

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file; what :meth:`save` leaves out is empty."""
        target = Path(path)
        match = _EXPERT_FILE.search(path)
        if not match:
            return load_tensors(target)
        layer, slot = int(match[1]), int(match[2])
        number = self._file_number(layer, slot)
        if number is None or not self.layers[layer].experts_train:
            return {}
        return _renumber(load_tensors(target.with_name(expert_file(layer, number))), slot)

    def _file_number(self, layer: int, slot: int) -> int | None:
        """DeepSpeed's rank * slots + slot to the model's own number; None for an empty slot."""
        rank, local = divmod(slot, self.layers[layer].num_local_experts)
        numbers = self.layers[layer].placement[rank]
        return numbers[local] - 1 if local < len(numbers) else None


def _renumber(state: dict[str, Any], number: int) -> dict[str, Any]:
    return {_EXPERT_KEY.sub(rf"\g<1>{number}\g<3>", name): tensor for name, tensor in state.items()}


def save_checkpoint(engine: Any, folder: Path, tag: str, manifest: dict[str, Any], keep: int) -> None:
    """Save on all ranks: files, then the manifest, then ``latest``; then drop what is no longer kept.

    Args:
        manifest: what the checkpoint is of; the files' hashes are added.
        keep: how many of the newest to keep, beside the best.
    """
    files = engine.checkpoint_engine
    files.files.clear()
    if dist.get_rank() == 0:
        shutil.rmtree(folder / tag, ignore_errors=True)
    dist.barrier()
    engine.save_checkpoint(
        str(folder), tag=tag, client_state={"run": manifest}, save_latest=False, exclude_frozen_parameters=True
    )
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, files.files)
    if dist.get_rank() == 0:
        complete = {name: entry for part in gathered for name, entry in part.items()}
        fsync_path(folder / tag)
        write_json(folder / tag / MANIFEST, {**manifest, "files": dict(sorted(complete.items()))})
        write_text(folder / "latest", tag)
        prune(folder, keep)
    dist.barrier()


def mark_best(folder: Path, tag: str, value: float) -> None:
    """Name the best checkpoint so far."""
    write_json(folder / "best.json", {"tag": tag, "bits_per_character": value})


def best(folder: Path) -> dict[str, Any] | None:
    """The best checkpoint's tag and value, if one was marked."""
    path = folder / "best.json"
    return read_json(path) if path.is_file() else None


def complete_tags(folder: Path) -> list[str]:
    """Tags with a manifest, newest (highest step) first."""
    if not folder.is_dir():
        return []
    return sorted((p.name for p in folder.iterdir() if (p / MANIFEST).is_file()), reverse=True)


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` complete checkpoints, the best, and what ``latest`` names."""
    protected = set(complete_tags(folder)[:keep])
    marked = best(folder)
    if marked:
        protected.add(marked["tag"])
    for tag in complete_tags(folder):
        if tag not in protected:
            (folder / tag / MANIFEST).unlink()
            shutil.rmtree(folder / tag)


def damaged_files(folder: Path, names: Iterable[str] | None = None) -> list[str]:
    """Files of a tag that are missing, or do not have the size and hash that its manifest says."""
    files = read_json(folder / MANIFEST)["files"]
    bad = []
    for name in files if names is None else names:
        path = folder / name
        entry = files[name]
        if not path.is_file() or path.stat().st_size != entry["bytes"] or sha256_file(path) != entry["sha256"]:
            bad.append(name)
    return bad


def damaged_weights(folder: Path) -> list[str]:
    """:func:`damaged_files`, of a tag's weights alone: all that scoring and a later stage read."""
    files = read_json(folder / MANIFEST)["files"]
    return damaged_files(folder, [name for name in files if name.endswith("model_states.pt")])


def newest_sound_tag(folder: Path) -> tuple[str | None, list[str]]:
    """The newest tag whose files are all sound, and a line for each newer one that is not."""
    complaints: list[str] = []
    for tag in complete_tags(folder):
        bad = damaged_files(folder / tag)
        if not bad:
            return tag, complaints
        complaints.append(
            f"{folder / tag}: {', '.join(bad)} damaged or missing; falling back to an earlier checkpoint"
        )
    return None, complaints


def check_same_run(found: dict[str, Any], expected: dict[str, Any], where: Path) -> None:
    """Refuse a checkpoint of another model, plan or tokenizer.

    Raises:
        UserError: names what differs.
    """
    for key, what in (("model", "model"), ("plan", "expert plan"), ("tokenizer", "tokenizer")):
        if found.get(key) != expected[key]:
            raise UserError(
                f"{where}: is a checkpoint of another {what} ({found.get(key)}, this run has {expected[key]}); "
                "give the run another name, or delete its stage folders"
            )
