"""A further expansion: experts for more languages, added to an expanded model (LayerMoE, arXiv 2505.22582, section 4).

All experts that are there freeze. New ones begin as copies of expert 0, as in the first expansion, or of the expert
that the new languages use most. Routers and classifiers keep their trained rows and get rows for what is new; new
experts' selection biases, where there are such, begin at zero.
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
from pipeline.checkpoint.weights import CLASSIFIER, SELECTION_BIAS, save_expert
from pipeline.method.losses import routing_statistics
from pipeline.method.parity import measure_difference
from pipeline.method.upcycle import files_of, save_shared
from pipeline.model.backbone import (
    decoder_layers,
    empty_model,
    find_mlp,
    install_moe_layers,
    moe_layers,
    named_moe_layers,
)
from pipeline.model.expert_plan import ExpertPlan
from pipeline.model.moe import collect_routings
from pipeline.model.moe.experts import fused_weights
from pipeline.model.new_rows import install_new_rows
from pipeline.records.checkpoint import HF_FOLDER, UPCYCLED_TAG, NewRows, UpcycledManifest

ROUTER = ".gate.wg.weight"
LONGEST = 1024  # tokens of a document that are looked at to find the most used experts


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
    copied: list[int] | None = None,
    write_copies: bool = False,
) -> UpcycledManifest:
    """Write the checkpoint that the next stage starts from, as :func:`pipeline.method.upcycle.upcycle` does.

    Experts of earlier expansions have files; new ones that are copies of their layer's MLP have none. Rows of new
    tokens are taken over, and do not train again.

    Args:
        model: the expanded model, whole on one rank, with its classifiers.
        before: its plan.
        plan: the plan after this expansion; the same one where none is added.
        base: its upcycled checkpoint's folder and manifest; config, tokenizer and sizes are taken from there.
        samples: token ids of real text [B, L] for the receipt.
        target: the folder to make; it appears only when all of it is written.
        seed: of the routers' new rows, Xavier-normal.
        key: a content key of the model.
        router: whether trained rows of routers and classifiers are kept, or all are drawn anew, as the reference
            implementation does.
        copied: for each decoder layer, the number of the expert that new ones are copies of; None for 0 everywhere.
        write_copies: whether new experts have files though they are copies of the MLP.
    """
    folder, manifest = base
    with new_folder(target) as new:
        shutil.copytree(folder / HF_FOLDER, new / HF_FOLDER)
        (new / UPCYCLED_TAG).mkdir()
        write_experts(model, before, plan, new / UPCYCLED_TAG)
        dtype = getattr(torch, manifest.dtype)
        rows = None if manifest.new_rows is None else manifest.new_rows.model_copy(update={"train": False})
        biased = any(layer.router.selection_bias is not None for layer in moe_layers(model))
        shared = _write_shared(model, plan, new, dtype, seed, keep=router == "keep", biased=biased, rows=rows)
        if plan != before:
            sources = copied or [0] * plan.num_layers
            _write_copies(model, shared, plan, new / UPCYCLED_TAG, sources, of_mlp=write_copies)
        write_text(new / "latest", UPCYCLED_TAG)
        parity = measure_difference(
            model, new, plan, samples, dtype, classifiers=True, selection_biases=biased, new_rows=rows
        )
        expanded = manifest.model_copy(
            update={
                "files": files_of(new),
                "model": key,
                "plan": plan.model_dump(mode="json"),
                "seed": seed,
                "copied": copied,
                "parity": parity.record(),
                "new_rows": rows,
                "selection_biases": biased,
            }
        )
        write_manifest(new, expanded)
    return expanded


def write_experts(model: nn.Module, before: ExpertPlan, plan: ExpertPlan, folder: Path) -> None:
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
    biased: bool,
    rows: NewRows | None,
) -> dict[str, Tensor]:
    """Everything but experts; returns it."""
    expanded = empty_model(folder / HF_FOLDER, dtype)
    install_moe_layers(expanded, plan, classifiers=True, selection_biases=biased)
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
        if name.endswith((ROUTER, CLASSIFIER, SELECTION_BIAS)):
            state[name] = _with_new_rows(fresh, found, copy_last=name.endswith(CLASSIFIER)) if keep else fresh
        else:
            assert found is not None, name
            state[name] = found.to(fresh.dtype)
    save_shared(expanded, state, plan, folder / UPCYCLED_TAG)
    return state


def _write_copies(
    model: nn.Module, shared: dict[str, Tensor], plan: ExpertPlan, folder: Path, copied: list[int], *, of_mlp: bool
) -> None:
    """A file for each new expert, those that are copies of the MLP left out unless ``of_mlp``."""
    layers = dict(enumerate(decoder_layers(model)))
    names = [name.removesuffix(f".deepspeed_moe{ROUTER}") for name in shared if name.endswith(ROUTER)]
    for index, (name, layer) in enumerate(zip(names, plan.moe_layers, strict=True)):
        if copied[layer]:
            trained = getattr(layers[layer], find_mlp(layers[layer])).local_experts
            weights = trained.experts[copied[layer] - 1].state_dict()
        elif of_mlp:
            mlp = f"{name}.base_mlp."
            weights = fused_weights({n.removeprefix(mlp): tensor for n, tensor in shared.items() if n.startswith(mlp)})
        else:
            continue
        for number in range(plan.num_frozen(layer), plan.num_new[layer]):
            save_expert(weights, folder, name, index, number)


@torch.inference_mode()
def most_used_experts(model: PreTrainedModel, plan: ExpertPlan, documents: list[np.ndarray]) -> list[int]:
    """For each decoder layer, the expert that tokens choose most often, the first of equals; 0 in a dense layer.

    Args:
        model: with its MoE layers, whole on one rank.
        plan: of its experts.
        documents: token ids of text of the new languages.
    """
    choices = {layer: torch.zeros(plan.counts[layer]) for layer in plan.moe_layers}
    for ids in documents:
        ids_BL = torch.from_numpy(ids[:LONGEST].astype(np.int64)).unsqueeze(0)
        with collect_routings(model) as routings:
            model(input_ids=ids_BL, use_cache=False)
        everything_T = torch.ones(ids_BL.numel(), dtype=torch.bool)
        for layer, routing in zip(plan.moe_layers, routings, strict=True):
            choices[layer] += routing_statistics(routing, everything_T)["choices"]
    return [int(choices[layer].argmax()) if layer in choices else 0 for layer in range(plan.num_layers)]


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
