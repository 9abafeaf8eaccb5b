"""Exports a trained mixture, and compares the exported folder's logits with those of the model in training."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from common.files import new_folder, write_text
from pipeline.export.folder import write_folder
from pipeline.method.lora import without_adapters
from pipeline.method.parity import logits_in_fp32
from pipeline.model.expert_plan import ExpertPlan

CARD_FILE = "README.md"


@dataclass(frozen=True)
class Exported:
    """What came of it.

    Attributes:
        difference: the largest between logits of the folder and of the model in training, both computed in fp32.
        largest: logit of the model in training.
        tokens: how many were compared.
        parameters: of the exported model.
        bytes: of the folder.
    """

    difference: float
    largest: float
    tokens: int
    parameters: int
    bytes: int


@torch.inference_mode()
def export(
    model: PreTrainedModel,
    plan: ExpertPlan,
    hf: Path,
    target: Path,
    dtype: torch.dtype,
    samples: np.ndarray,
    card: str | None = None,
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

    Raises:
        UserError: its MLPs have biases.
    """
    ids_BL = torch.from_numpy(samples.astype(np.int64))
    expected = logits_in_fp32(model, ids_BL)
    with new_folder(target) as folder:
        write_folder(without_adapters(model), plan, hf, folder, dtype)
        if card is not None:
            write_text(folder / CARD_FILE, card)
        del model
        exported = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype).eval()
        if plan.moe_layers:
            exported.set_experts_implementation("eager")  # one expert after another, as in training
        parameters = sum(parameter.numel() for parameter in exported.parameters())
        found = logits_in_fp32(exported, ids_BL)
    size = sum(file.stat().st_size for file in target.iterdir())
    difference = float((found - expected).abs().max())
    return Exported(difference, float(expected.abs().max()), ids_BL.numel(), parameters, size)
