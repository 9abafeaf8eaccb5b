"""Turns a dense Hugging Face model into a DeepSpeed-MoE checkpoint (MoE-LPR, arXiv 2408.11396, section 3.1)."""

import shutil
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from functools import partial
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
    copy_mlps,
    local_expert_names,
    read_weights,
    save_expert,
)
from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.method.expert_init import ExpertInit, expert_generator
from pipeline.model.backbone import (
    ONE_RANK,
    decoder_layers,
    empty_model,
    find_mlp,
    install_moe_layers,
    load_dense,
    model_config,
    moe_layers,
    named_moe_layers,
)
from pipeline.model.expert_plan import ExpertPlan
from pipeline.model.moe import MoELayer
from pipeline.model.moe.experts import Expert, fused_weights
from pipeline.records.checkpoint import CheckpointManifest, FileEntry, UpcycledManifest

TAG = "upcycled"
HF_FOLDER = "hf"  # config and tokenizer, so that training does not need the dense model
EXACT_COPIES = ExpertInit()
TOLERANCE = 1e-4  # of the largest logit; fp32 rounding stays two orders of magnitude below
HF_FILES = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "*.model", "vocab.json",
             "merges.txt", "chat_template*", "added_tokens.json")  # fmt: skip


@dataclass(frozen=True)
class Parity:
    """The receipt: how far the upcycled model's logits are from the dense model's, in fp32, on real text.

    Attributes:
        max_abs_logit_difference: the largest difference.
        max_abs_logit: the dense model's largest logit.
        tolerance: the largest difference that is allowed.
        tokens: how many were compared.
    """

    max_abs_logit_difference: float
    max_abs_logit: float
    tolerance: float
    tokens: int

    @property
    def holds(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self.max_abs_logit_difference <= self.tolerance

    def record(self) -> dict[str, float | int | bool]:
        """As a manifest holds it."""
        return {**asdict(self), "holds": self.holds}


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
) -> UpcycledManifest:
    """Write the upcycled checkpoint; returns its manifest.

    It has three parts: the checkpoint proper in DeepSpeed's layout under ``upcycled/``, config and tokenizer under
    ``hf/``, and a manifest (:class:`pipeline.records.checkpoint.UpcycledManifest`). Experts that begin as copies of
    an MLP have no files of their own unless they are asked for: :func:`load_upcycled` copies the MLP.

    Args:
        dense: folder of the dense model.
        plan: of the experts.
        samples: token ids of real text [B, L] for the receipt.
        target: the folder to make; it appears only when all of it is written and the receipt is good.
        seed: of the routers' Xavier-normal initialisation.
        model_hash: of the dense model's files.
        init: what new experts begin as; unless as exact copies of the original MLP, the logits may differ.
        write_copies: whether experts have files though they are copies, so that DeepSpeed itself can load them.

    Raises:
        UserError: the model's MLPs can't become experts, or the logits differ.
    """
    dtype = getattr(torch, str(_config_dtype(dense)))
    with new_folder(target) as folder:
        init_of_files = None if init.copies and not write_copies else init
        shape = _write_weights(dense, plan, folder / TAG, dtype=dtype, seed=seed, experts=init_of_files)
        (folder / HF_FOLDER).mkdir()
        for pattern in HF_FILES:
            for file in dense.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, folder / HF_FOLDER / file.name)
        write_text(folder / "latest", TAG)
        parity = measure_parity(dense, folder, plan, samples, dtype)
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
            **shape,
        )
        write_manifest(folder, manifest)
    return manifest


def _config_dtype(dense: Path) -> str:
    config = model_config(dense)
    return str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")


@torch.no_grad()
def _write_weights(
    dense: Path, plan: ExpertPlan, folder: Path, *, dtype: torch.dtype, seed: int, experts: ExpertInit | None
) -> dict[str, Any]:
    """DeepSpeed's layout: one file per new expert, unless ``experts`` is None, and one of everything else."""
    folder.mkdir()
    model = load_dense(dense, dtype)
    dense_parameters = sum(p.numel() for p in model.parameters())
    first = decoder_layers(model)[0]
    first_mlp = getattr(first, find_mlp(first))
    install_moe_layers(model, plan)
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
    return {str(path.relative_to(folder)): file_entry(path) for path in sorted((folder / TAG).iterdir())}


def load_upcycled(
    folder: Path,
    plan: ExpertPlan,
    dtype: torch.dtype,
    dims: ParallelDims = ONE_RANK,
    *,
    checkpoints: Sequence[Path] = (),
    classifiers: bool = False,
    selection_biases: bool = False,
    once: bool = False,
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
        once: whether each weight is read by one rank alone; see :func:`pipeline.checkpoint.weights.read_weights`.

    Raises:
        UserError: a file is missing or does not hold what the plan says.
    """
    model = empty_model(folder / HF_FOLDER, dtype)
    biased = selection_biases or any(read_manifest(tag, CheckpointManifest).selection_biases for tag in checkpoints)
    install_moe_layers(model, plan, dims, classifiers=classifiers, selection_biases=biased)
    model.tie_weights()
    tags = (folder / TAG, *checkpoints)
    missing = set.intersection(*(read_weights(model, tag, once=once) for tag in tags))
    missing = {name for name in missing if not name.endswith((CLASSIFIER, SELECTION_BIAS))}
    files = read_manifest(folder, UpcycledManifest).files
    copies = {
        prefix
        for (layer, number), prefix in local_expert_names(model).items()
        if f"{TAG}/{expert_file(layer, number)}" not in files
    }
    missing -= copy_mlps(model, folder / TAG, {name for name in missing if name.rpartition(".")[0] in copies})
    if missing:
        raise UserError(
            f"{folder}: {sorted(missing)[0]} and {len(missing) - 1} more are missing; upcycle again with --force"
        )
    return model


def measure_parity(dense: Path, folder: Path, plan: ExpertPlan, samples: np.ndarray, dtype: torch.dtype) -> Parity:
    """:func:`measure_difference` to the dense model."""
    return measure_difference(load_dense(dense, dtype), folder, plan, samples, dtype)


@torch.inference_mode()
def measure_difference(
    model: PreTrainedModel,
    folder: Path,
    plan: ExpertPlan,
    samples: np.ndarray,
    dtype: torch.dtype,
    *,
    classifiers: bool = False,
) -> Parity:
    """Compare a model's logits with those of the upcycled one, read back from its files, in fp32.

    It takes the memory of the model in its own dtype, and of one layer in fp32: files are mapped into memory, and
    experts that have none are copied from their layer's MLP when its turn comes.
    """
    ids_BL = torch.from_numpy(samples.astype(np.int64))
    expected = logits_in_fp32(model, ids_BL)
    upcycled = empty_model(folder / HF_FOLDER, dtype)
    install_moe_layers(upcycled, plan, classifiers=classifiers)
    upcycled.tie_weights()
    missing = read_weights(upcycled, folder / TAG, mapped=True)
    found = logits_in_fp32(upcycled, ids_BL, missing)
    largest = float(expected.abs().max())
    difference = float((found - expected).abs().max())
    return Parity(difference, largest, TOLERANCE * max(largest, 1.0), ids_BL.numel())


def logits_in_fp32(model: PreTrainedModel, ids_BL: Tensor, copies: Collection[str] = ()) -> Tensor:
    """Logits [B, L, V] as ``model.float()`` would compute them; each part is converted when its turn comes.

    Experts whose parameters ``copies`` names get the weights of their layer's MLP then.
    """
    layers = list(decoder_layers(model))
    inside = {module for layer in layers for module in layer.modules()}
    others = [module for module in model.modules() if module not in inside and module._parameters]
    for part in (*layers, *others):
        _compute_in_fp32(part)
    names = {parameter: name for name, parameter in model.named_parameters()}
    for layer in moe_layers(model):
        experts = [e for e in layer.local_experts.experts if all(names[p] in copies for p in e.parameters())]
        layer.register_forward_pre_hook(partial(_copy_mlp, experts))
    return model(input_ids=ids_BL, use_cache=False).logits


def _copy_mlp(experts: list[Expert], layer: MoELayer, _inputs: Any) -> None:
    """Share an MLP's weights, fused, among experts."""
    weights = fused_weights(layer.base_mlp.state_dict()) if experts else {}
    for expert in experts:
        for name, weight in weights.items():
            getattr(expert, name).data = weight


def _compute_in_fp32(module: nn.Module) -> None:
    """Convert a module's parameters before each of its forwards, and put back what was there after it."""
    stored: list[tuple[nn.Parameter, Tensor]] = []

    def convert(*_: Any) -> None:
        stored.extend((parameter, parameter.data) for parameter in module.parameters())
        for parameter, data in stored:
            parameter.data = data.float()

    def put_back(*_: Any) -> None:
        for parameter, data in stored:
            parameter.data = data
        stored.clear()

    module.register_forward_pre_hook(convert)
    module.register_forward_hook(put_back)
