"""Writes an exported folder: weights shard by shard, config, code, tokenizer."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from common.files import fsync_path, write_json
from common.progress import progress
from pipeline.export.form import Contents
from pipeline.export.remote_code import write_code
from pipeline.export.tensors import Planned
from pipeline.method.upcycle import HF_FILES, copy_files

SHARD_SIZE = "5GB"


def write_folder(contents: Contents, hf: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write everything; the model's weights may be gone afterwards.

    Args:
        contents: what the folder holds.
        hf: a folder with the tokenizer.
        folder: that is there, and empty.
        dtype: of the weights.
    """
    if contents.class_names is not None:
        write_code(folder, contents.class_names)
    copy_files(hf, HF_FILES, folder)
    config = contents.config | {"dtype": str(dtype).removeprefix("torch.")}
    write_json(folder / "config.json", json.loads(json.dumps(config, default=str)))
    write_weights(contents.tensors, folder)


def write_weights(planned: Mapping[str, Planned], folder: Path) -> None:
    """Safetensors files of at most ``SHARD_SIZE``, with an index where there are several."""
    split = split_torch_state_dict_into_shards(
        {name: one.meta for name, one in planned.items()}, max_shard_size=SHARD_SIZE
    )
    with progress(len(planned), "export", "tensor") as bar:
        for file, tensors in split.filename_to_tensors.items():
            shard = {}
            for name in tensors:
                shard[name] = planned[name].make()
                bar.update(1)
            save_file(shard, folder / file, metadata={"format": "pt"})
            shutil.copymode(folder / "config.json", folder / file)  # safetensors lets nobody else read it
            fsync_path(folder / file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
