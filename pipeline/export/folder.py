"""Writes an exported folder: weights shard by shard, config, code, tokenizer."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import PreTrainedModel

from common.files import fsync_path, write_json
from common.progress import progress
from pipeline.export.remote_code import auto_map, class_names, write_code
from pipeline.export.tensors import planned_tensors
from pipeline.method.upcycle import HF_FILES, copy_files
from pipeline.model.backbone import moe_layers
from pipeline.model.expert_plan import ExpertPlan
from pipeline.model.new_rows import first_new_row, vocabulary_of

SHARD_SIZE = "5GB"


def write_folder(model: PreTrainedModel, plan: ExpertPlan, hf: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write everything; the model's weights are gone afterwards.

    Args:
        model: the mixture, whole on one rank, or a dense model, which needs no code of its own.
        plan: of its experts.
        hf: a folder with the tokenizer.
        folder: that is there, and empty.
        dtype: of the weights.
    """
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    if plan.moe_layers:
        names = class_names(model)
        write_code(folder, names)
        config |= {**mixture_config(model, plan), **auto_map(names)}
    if first_new_row(model) is not None:
        config["vocab_size"] = vocabulary_of(model)
    config["dtype"] = str(dtype).removeprefix("torch.")
    copy_files(hf, HF_FILES, folder)
    write_json(folder / "config.json", json.loads(json.dumps(config, default=str)))
    write_weights(model, folder, dtype)


def mixture_config(model: PreTrainedModel, plan: ExpertPlan) -> dict[str, Any]:
    """What the config says of the mixture; layers whose classifiers the model does not have yet are left out."""
    routers = {layer: one.router for layer, one in zip(plan.moe_layers, moe_layers(model), strict=True)}
    return {
        "expert_counts": list(plan.counts),
        "num_experts_per_tok": plan.top_k,
        "classifier_layers": [layer for layer, router in routers.items() if router.classifier is not None],
        "old_experts": [list(plan.old_experts(layer)) for layer in range(plan.num_layers)],
        "selection_biases": any(router.selection_bias is not None for router in routers.values()),
        "classifies_sequences": plan.classifier == "sequence",
    }


def write_weights(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Safetensors files of at most ``SHARD_SIZE``, with an index where there are several."""
    planned = planned_tensors(model, dtype)
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
