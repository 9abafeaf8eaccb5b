"""A further expansion: experts for more languages, added to an expanded model (LayerMoE, arXiv 2505.22582, section 4).

All experts that are there freeze. New ones begin as copies of expert 0, as in the first expansion. Routers and
classifiers keep their trained rows and get rows for what is new.
"""

import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.files import new_folder, write_text
from pipeline.checkpoint.store import write_manifest
from pipeline.checkpoint.weights import CLASSIFIER, save_expert
from pipeline.method.upcycle import HF_FOLDER, TAG, Parity, files_of, measure_difference, save_shared
from pipeline.model.backbone import empty_model, install_moe_layers, moe_layers, named_moe_layers
from pipeline.model.expert_plan import ExpertPlan
from pipeline.model.moe.experts import fused_weights
from pipeline.model.new_rows import install_new_rows
from pipeline.records.checkpoint import NewRows, UpcycledManifest

ROUTER = ".gate.wg.weight"


def expand(
    model: PreTrainedModel,
    before: ExpertPlan,
    plan: ExpertPlan,
    base: tuple[Path, UpcycledManifest],
    samples: np.ndarray,
    target: Path,
    *,
    seed: int,
    key: str,
    router: Literal["keep", "reset"] = "keep",
    write_copies: bool = False,
) -> UpcycledManifest:
    """Write the checkpoint that the next stage 1 starts from, as :func:`pipeline.method.upcycle.upcycle` does.

    Experts of earlier expansions have files; new ones, copies of their layer's MLP, have none. Rows of new tokens are
    taken over, and do not train again.

    Args:
        model: the expanded model, whole on one rank, with its classifiers.
        before: its plan.
        plan: the plan after this expansion.
        base: its upcycled checkpoint's folder and manifest; config, tokenizer and sizes are taken from there.
        samples: token ids of real text [B, L] for the receipt.
        target: the folder to make; it appears only when all of it is written.
        seed: of the routers' new rows, Xavier-normal.
        key: a content key of the model.
        router: whether trained rows of routers and classifiers are kept, or all are drawn anew, as the reference
            implementation does.
        write_copies: whether new experts have files too.
    """
    folder, manifest = base
    with new_folder(target) as new:
        shutil.copytree(folder / HF_FOLDER, new / HF_FOLDER)
        (new / TAG).mkdir()
        _write_experts(model, before, plan, new / TAG)
        dtype = getattr(torch, manifest.dtype)
        rows = None if manifest.new_rows is None else manifest.new_rows.model_copy(update={"train": False})
        shared = _write_shared(model, plan, new, dtype, seed, keep=router == "keep", rows=rows)
        if write_copies:
            _write_copies(shared, plan, new / TAG)
        write_text(new / "latest", TAG)
        parity: Parity = measure_difference(model, new, plan, samples, dtype, classifiers=True, new_rows=rows)
        expanded = manifest.model_copy(
            update={
                "files": files_of(new),
                "model": key,
                "plan": plan.model_dump(mode="json"),
                "seed": seed,
                "parity": parity.record(),
                "new_rows": rows,
            }
        )
        write_manifest(new, expanded)
    return expanded


def _write_experts(model: nn.Module, before: ExpertPlan, plan: ExpertPlan, folder: Path) -> None:
    """A file for each expert that is there; a layer's number among MoE layers may have changed."""
    for number_before, (name, layer) in zip(before.moe_layers, named_moe_layers(model).items(), strict=True):
        for number, expert in enumerate(layer.local_experts.experts):
            save_expert(expert.state_dict(), folder, name, plan.moe_layers.index(number_before), number)


@torch.no_grad()
def _write_shared(
    model: PreTrainedModel,
    plan: ExpertPlan,
    folder: Path,
    dtype: torch.dtype,
    seed: int,
    *,
    keep: bool,
    rows: NewRows | None,
) -> dict[str, Tensor]:
    """Everything but experts; returns it."""
    expanded = empty_model(folder / HF_FOLDER, dtype)
    install_moe_layers(expanded, plan, classifiers=True)
    expanded.tie_weights()
    install_new_rows(expanded, rows)
    generator = torch.Generator().manual_seed(seed)
    for layer in moe_layers(expanded):
        layer.router.reset(generator)
    trained = model.state_dict()
    state: dict[str, Tensor] = {}
    for name, fresh in expanded.state_dict().items():
        # A layer that was dense has its MLP under another name.
        found = trained.get(name, trained.get(name.replace(".base_mlp.", ".")))
        if ".deepspeed_experts." in name:
            continue
        if name.endswith((ROUTER, CLASSIFIER)):
            state[name] = _with_new_rows(fresh, found, copy_last=name.endswith(CLASSIFIER)) if keep else fresh
        else:
            assert found is not None, name
            state[name] = found.to(fresh.dtype)
    save_shared(expanded, state, plan, folder / TAG)
    return state


def _write_copies(shared: dict[str, Tensor], plan: ExpertPlan, folder: Path) -> None:
    """A file for each new expert, though it is a copy."""
    names = [name.removesuffix(f".deepspeed_moe{ROUTER}") for name in shared if name.endswith(ROUTER)]
    for index, (name, layer) in enumerate(zip(names, plan.moe_layers, strict=True)):
        mlp = f"{name}.base_mlp."
        weights = fused_weights({n.removeprefix(mlp): tensor for n, tensor in shared.items() if n.startswith(mlp)})
        for number in range(plan.num_frozen(layer), plan.num_new[layer]):
            save_expert(weights, folder, name, index, number)


def _with_new_rows(fresh: Tensor, trained: Tensor | None, *, copy_last: bool) -> Tensor:
    """Trained rows, where there are any, before fresh ones.

    A classifier's last row stood for the new languages, which are an old group now. The row for those that are new
    now begins as its copy: the last of equal classes counts, so such tokens may use the new experts.
    """
    if trained is None:
        return fresh
    rows = fresh.clone()
    rows[: len(trained)] = trained
    if copy_last:
        rows[len(trained) :] = trained[-1]
    return rows
