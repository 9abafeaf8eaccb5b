"""Exports a trained model, and compares the exported folder's logits with those of the model in training."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from common.errors import UserError
from common.files import new_folder, write_text
from pipeline.export.folder import write_folder
from pipeline.export.form import Form
from pipeline.export.origin import Origin, write_origin
from pipeline.export.own_code import OwnCode
from pipeline.export.tensors import planned_tensors
from pipeline.method.lora import without_adapters
from pipeline.method.parity import TOLERANCE, logits_in_fp32
from pipeline.model.expert_plan import ExpertPlan

CARD_FILE = "README.md"
CHAT_TEMPLATE_FILE = "chat_template.jinja"  # which goes before one in tokenizer_config.json


@dataclass(frozen=True)
class Exported:
    """What came of it.

    Attributes:
        difference: the largest between logits of the folder and of the model in training, both computed in fp32.
        largest: logit of the model in training.
        tokens: how many were compared.
        parameters: of the exported model.
        bytes: of the folder.
        added: of the parameters, those that the form needs and the trained model does not have.
        rounded_difference: the largest difference with routers as transformers loads them in the folder's dtype;
            None where it rounds none.
    """

    difference: float
    largest: float
    tokens: int
    parameters: int
    bytes: int
    added: int = 0
    rounded_difference: float | None = None


@torch.inference_mode()
def export(
    model: PreTrainedModel,
    plan: ExpertPlan,
    hf: Path,
    target: Path,
    dtype: torch.dtype,
    samples: np.ndarray,
    card: str | None = None,
    form: Form | None = None,
    chat_template: str | None = None,
    origin: Origin | None = None,
) -> Exported:
    """Write the folder; the model's weights are gone afterwards.

    Args:
        model: the mixture, whole on one rank, or a dense model, on the CPU; adapters are merged into its weights.
        plan: of its experts.
        hf: a folder with the tokenizer.
        target: the folder to make; it appears only when all of it is written.
        dtype: of the weights.
        samples: token ids of real text [B, L] to compare logits on.
        card: the text of its README.md; None for none.
        form: that it is written in; its own code unless given.
        chat_template: of its tokenizer; the tokenizer's own without it.
        origin: what an import needs to know besides the weights; None for a dense model.

    Raises:
        UserError: its MLPs have biases, or the folder computes something else.
    """
    ids_BL = torch.from_numpy(samples.astype(np.int64))
    expected_BLV = logits_in_fp32(model, ids_BL)
    exact = bool(plan.moe_layers) and dtype in (model.dtype, torch.float32)  # merged adapters are rounded
    form = form or OwnCode()
    with new_folder(target) as folder:
        contents = form.contents(without_adapters(model), plan, dtype)
        added = contents.parameters - sum(one.size for one in planned_tensors(model, dtype).values())
        write_folder(contents, hf, folder, dtype)
        if card is not None:
            write_text(folder / CARD_FILE, card)
        if chat_template is not None:
            write_text(folder / CHAT_TEMPLATE_FILE, chat_template)
        if origin is not None:
            write_origin(origin, folder)
        rounded, trusts = contents.rounded, contents.class_names is not None
        del contents
        _forget_weights(model)
        exported = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trusts, dtype=dtype).eval()
        if plan.moe_layers:
            exported.set_experts_implementation("eager")  # one expert after another, as in training
        parameters = sum(parameter.numel() for parameter in exported.parameters())
        rounded_difference = None
        if rounded:
            rounded_difference = float((logits_in_fp32(exported, ids_BL) - expected_BLV).abs().max())
            _set_parameters(exported, rounded)
        differences_BL = (logits_in_fp32(exported, ids_BL) - expected_BLV).abs().amax(-1)
        largest = float(expected_BLV.abs().max())
        # The choice between experts that score alike may fall otherwise for single tokens, not for most.
        if exact and float(differences_BL.median()) > TOLERANCE * max(largest, 1.0):
            raise UserError(
                f"export: as {form.name} the folder's logits would differ from the trained model's by "
                f"{float(differences_BL.median()):.2g} on half of the tokens; nothing was written: use another form"
            )
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    return Exported(
        float(differences_BL.max()), largest, ids_BL.numel(), parameters, size, added, rounded_difference
    )  # fmt: skip


def _forget_weights(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)


def _set_parameters(model: PreTrainedModel, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        model.get_parameter(name).data = value
