"""The receipt of upcycling and expanding: logits before and after, in fp32."""

from collections.abc import Collection
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from pipeline.checkpoint.weights import read_weights
from pipeline.model.backbone import decoder_layers, empty_model, install_moe_layers, load_dense, moe_layers
from pipeline.model.expert_plan import ExpertPlan
from pipeline.model.moe import MoELayer
from pipeline.model.moe.experts import Expert, fused_weights
from pipeline.model.new_rows import install_new_rows
from pipeline.records.checkpoint import HF_FOLDER, UPCYCLED_TAG, NewRows

TOLERANCE = 1e-4  # of the largest logit; fp32 rounding stays two orders of magnitude below


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


def measure_parity(
    dense: Path,
    folder: Path,
    plan: ExpertPlan,
    samples: np.ndarray,
    dtype: torch.dtype,
    new_rows: NewRows | None = None,
) -> Parity:
    """:func:`measure_difference` to the dense model."""
    return measure_difference(load_dense(dense, dtype), folder, plan, samples, dtype, new_rows=new_rows)


@torch.inference_mode()
def measure_difference(
    model: PreTrainedModel,
    folder: Path,
    plan: ExpertPlan,
    samples: np.ndarray,
    dtype: torch.dtype,
    *,
    classifiers: bool = False,
    selection_biases: bool = False,
    new_rows: NewRows | None = None,
) -> Parity:
    """Compare a model's logits with those of the upcycled one, read back from its files, in fp32.

    Where the dense model has no rows for new tokens, logits of the ids before them are compared.

    It takes the memory of the model in its own dtype, and of one layer in fp32: files are mapped into memory, and
    experts that have none are copied from their layer's MLP when its turn comes.
    """
    ids_BL = torch.from_numpy(samples.astype(np.int64))
    expected = logits_in_fp32(model, ids_BL)
    upcycled = empty_model(folder / HF_FOLDER, dtype)
    install_moe_layers(upcycled, plan, classifiers=classifiers, selection_biases=selection_biases)
    upcycled.tie_weights()
    install_new_rows(upcycled, new_rows)
    missing = read_weights(upcycled, folder / UPCYCLED_TAG, reading="mapped")
    found = logits_in_fp32(upcycled, ids_BL, missing)
    if new_rows is not None and new_rows.train:  # the first expansion's: the dense model has none
        found, expected = found[..., : new_rows.first], expected[..., : new_rows.first]
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
    handles = [handle for part in (*layers, *others) for handle in _compute_in_fp32(part)]
    names = {parameter: name for name, parameter in model.named_parameters()}
    for layer in moe_layers(model):
        experts = [e for e in layer.local_experts.experts if all(names[p] in copies for p in e.parameters())]
        handles.append(layer.register_forward_pre_hook(partial(_copy_mlp, experts)))
    try:
        return model(input_ids=ids_BL, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


def _copy_mlp(experts: list[Expert], layer: MoELayer, _inputs: Any) -> None:
    """Share an MLP's weights, fused, among experts."""
    weights = fused_weights(layer.base_mlp.state_dict()) if experts else {}
    for expert in experts:
        for name, weight in weights.items():
            getattr(expert, name).data = weight


def _compute_in_fp32(module: nn.Module) -> tuple[RemovableHandle, RemovableHandle]:
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

    return module.register_forward_pre_hook(convert), module.register_forward_hook(put_back)
