"""Turns a dense Hugging Face model into a DeepSpeed-MoE checkpoint (MoE-LPR, arXiv 2408.11396, section 3.1)."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.errors import UserError
from common.files import new_folder, write_text
from common.progress import progress
from pipeline.checkpoint.store import read_manifest, write_manifest
from pipeline.checkpoint.tensors import expert_file, file_entry, main_file, save_tensors
from pipeline.checkpoint.weights import (
    CLASSIFIER,
    SELECTION_BIAS,
    Reading,
    copy_mlps,
    local_expert_names,
    read_weights,
    save_expert,
)
from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.method.expert_init import ExpertInit, expert_generator
from pipeline.method.new_tokens import ExtendedTokenizer, add_new_rows
from pipeline.method.parity import measure_parity
from pipeline.model.backbone import (
    ONE_RANK,
    decoder_layers,
    empty_model,
    find_mlp,
    install_moe_layers,
    load_dense,
    named_moe_layers,
)
from pipeline.model.expert_plan import ExpertPlan
from pipeline.model.model_folder import model_config
from pipeline.model.new_rows import install_new_rows
from pipeline.records.checkpoint import HF_FOLDER, UPCYCLED_TAG, CheckpointManifest, FileEntry, UpcycledManifest

EXACT_COPIES = ExpertInit()
CONFIG_FILES = ("config.json", "generation_config.json")
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "*.model", "vocab.json", "merges.txt", "chat_template*",
                   "added_tokens.json")  # fmt: skip
HF_FILES = (*CONFIG_FILES, *TOKENIZER_FILES)


def upcycle(
    dense: Path,
    plan: ExpertPlan,
    samples: np.ndarray,
    target: Path,
    *,
    seed: int,
    model_hash: str,
    init: ExpertInit = EXACT_COPIES,
    write_copies: bool = False,
    tokenizer: ExtendedTokenizer | None = None,
) -> UpcycledManifest:
    """Write the upcycled checkpoint; returns its manifest.

    It has three parts: the checkpoint proper in DeepSpeed's layout under ``upcycled/``, config and tokenizer under
    ``hf/``, and a manifest (:class:`pipeline.records.checkpoint.UpcycledManifest`). Experts that begin as copies of
    an MLP have no files of their own unless they are asked for: :func:`load_upcycled` copies the MLP.

    Args:
        dense: folder of the dense model.
        plan: of the experts.
        samples: token ids of real text [B, L] for the receipt, by the model's own tokenizer.
        target: the folder to make; it appears only when all of it is written and the receipt is good.
        seed: of the routers' Xavier-normal initialisation.
        model_hash: of the dense model's files.
        init: what new experts begin as; unless as exact copies of the original MLP, the logits may differ.
        write_copies: whether experts have files though they are copies, so that DeepSpeed itself can load them.
        tokenizer: the run's, where it extends the model's own: its new tokens get rows.

    Raises:
        UserError: the model's MLPs can't become experts, its embedding can't be extended, or the logits differ.
    """
    dtype = getattr(torch, str(_config_dtype(dense)))
    with new_folder(target) as folder:
        init_of_files = None if init.copies and not write_copies else init
        shape = _write_weights(
            dense, plan, folder / UPCYCLED_TAG, dtype=dtype, seed=seed, experts=init_of_files, tokenizer=tokenizer
        )
        (folder / HF_FOLDER).mkdir()
        copy_files(dense, CONFIG_FILES, folder / HF_FOLDER)
        copy_files(dense if tokenizer is None else tokenizer.folder, TOKENIZER_FILES, folder / HF_FOLDER)
        write_text(folder / "latest", UPCYCLED_TAG)
        rows = None if tokenizer is None else tokenizer.rows
        parity = measure_parity(dense, folder, plan, samples, dtype, rows)
        if init.copies and not parity.holds:
            raise UserError(
                f"upcycle: the upcycled model's logits differ from the dense model's by "
                f"{parity.max_abs_logit_difference:.3g} (allowed: {parity.tolerance:.3g}); nothing was written: "
                "this model does more with its MLPs than decoder layers usually do, so it can't be upcycled"
            )
        manifest = UpcycledManifest(
            files=files_of(folder),
            model=model_hash,
            plan=plan.model_dump(mode="json"),
            seed=seed,
            parity=parity.record(),
            new_rows=rows,
            **shape,
        )
        write_manifest(folder, manifest)
    return manifest


def copy_files(source: Path, patterns: Sequence[str], target: Path) -> None:
    """Copy the files of a folder whose names match one of the patterns."""
    for pattern in patterns:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)


def _config_dtype(dense: Path) -> str:
    config = model_config(dense)
    return str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")


@torch.no_grad()
def _write_weights(
    dense: Path,
    plan: ExpertPlan,
    folder: Path,
    *,
    dtype: torch.dtype,
    seed: int,
    experts: ExpertInit | None,
    tokenizer: ExtendedTokenizer | None,
) -> dict[str, Any]:
    """DeepSpeed's layout: one file per new expert, unless ``experts`` is None, and one of everything else."""
    folder.mkdir()
    model = load_dense(dense, dtype)
    dense_parameters = sum(p.numel() for p in model.parameters())
    first = decoder_layers(model)[0]
    first_mlp = getattr(first, find_mlp(first))
    install_moe_layers(model, plan)
    new_row_parameters = 0 if tokenizer is None else add_new_rows(model, tokenizer)
    generator = torch.Generator().manual_seed(seed)
    spread = getattr(model.config.get_text_config(), "initializer_range", 0.02)
    with progress(sum(plan.num_new), "upcycle", "expert", show=experts is not None) as bar:
        for index, (name, layer) in enumerate(named_moe_layers(model).items()):
            layer.router.reset(generator)
            if experts is None:
                continue
            for number in range(layer.num_experts - 1):
                own = generator if experts.kind == "random" else expert_generator(seed, index, number)
                weights = experts.weights(layer.base_mlp.state_dict(), spread, own)
                save_expert(weights, folder, name, index, number)
                bar.update(1)
    state = {name: tensor for name, tensor in model.state_dict().items() if ".deepspeed_experts." not in name}
    save_shared(model, state, plan, folder)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "dense_parameters": dense_parameters,
        "mlp_parameters": sum(p.numel() for p in first_mlp.parameters()),
        "hidden_size": first_mlp.gate_proj.in_features,
        "new_row_parameters": new_row_parameters,
    }


def save_shared(model: nn.Module, state: dict[str, Tensor], plan: ExpertPlan, folder: Path) -> None:
    """Write a tag's main file: all but experts. A parameter that has another name too, as a tied head, is there once.

    Args:
        model: whose state it is.
        state: the tensors, by name.
        plan: of the experts.
        folder: of the tag.
    """
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers()) if name in state]
    module = {name: state[name] for name in names}
    main = {"module": module, "num_experts": [n for n in plan.num_new if n], "dp_world_size": 1}
    save_tensors(main, folder / main_file())


def files_of(folder: Path) -> dict[str, FileEntry]:
    """The files of an upcycled checkpoint's tag, as its manifest names them."""
    return {str(path.relative_to(folder)): file_entry(path) for path in sorted((folder / UPCYCLED_TAG).iterdir())}


def load_upcycled(
    folder: Path,
    plan: ExpertPlan,
    dtype: torch.dtype,
    dims: ParallelDims = ONE_RANK,
    *,
    checkpoints: Sequence[Path] = (),
    classifiers: bool = False,
    selection_biases: bool = False,
    reading: Reading = "each",
) -> PreTrainedModel:
    """The MoE model with its upcycled weights, or those of checkpoints; each rank gets its own experts only.

    Args:
        folder: the upcycled checkpoint.
        plan: of the experts.
        dtype: of all weights but the routers', which are in fp32.
        dims: how experts are spread over ranks; all on one rank unless given.
        checkpoints: training checkpoints whose weights replace the upcycled ones, later ones last.
        classifiers: whether the plan's classifier layers get their classifier.
        selection_biases: whether routers get a selection bias even if no checkpoint has one.
        reading: how ranks read weights; see :func:`pipeline.checkpoint.weights.read_weights`.

    Raises:
        UserError: a file is missing or does not hold what the plan says.
    """
    model = empty_model(folder / HF_FOLDER, dtype)
    manifest = read_manifest(folder, UpcycledManifest)
    trained = any(read_manifest(tag, CheckpointManifest).selection_biases for tag in checkpoints)
    biased = selection_biases or manifest.selection_biases or trained
    install_moe_layers(model, plan, dims, classifiers=classifiers, selection_biases=biased)
    model.tie_weights()
    install_new_rows(model, manifest.new_rows)
    tags = (folder / UPCYCLED_TAG, *checkpoints)
    missing = set.intersection(*(read_weights(model, tag, reading=reading) for tag in tags))
    missing = {name for name in missing if not name.endswith((CLASSIFIER, SELECTION_BIAS))}
    copies = {
        prefix
        for (layer, number), prefix in local_expert_names(model).items()
        if f"{UPCYCLED_TAG}/{expert_file(layer, number)}" not in manifest.files
    }
    missing -= copy_mlps(model, folder / UPCYCLED_TAG, {name for name in missing if name.rpartition(".")[0] in copies})
    if missing:
        raise UserError(
            f"{folder}: {sorted(missing)[0]} and {len(missing) - 1} more are missing; upcycle again with --force"
        )
    return model
