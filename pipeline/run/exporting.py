"""The verb ``export``: a checkpoint of a run as a Hugging Face folder."""

from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError
from pipeline.records.checkpoint import HF_FOLDER, UpcycledManifest
from pipeline.records.evaluation import BASE, Evaluation
from pipeline.records.run_folder import EVALUATION_FILE
from pipeline.run.context import RunContext
from pipeline.run.scoring import models_to_score
from pipeline.run.upcycling import parity_samples

if TYPE_CHECKING:
    import torch

    from pipeline.export.card import CardFacts

FOLDER = "export"
DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}


def export_run(context: RunContext, checkpoint: str | None, dtype: str | None, to: Path | None) -> None:
    """Export a checkpoint, and say how far its logits are from those of the model in training.

    Args:
        context: the run.
        checkpoint: which one, as ``evaluate --checkpoint`` names them; the last stage's last without it.
        dtype: of the weights, one of ``DTYPES``; the run's own without it.
        to: the folder to make; ``export/`` in the run's folder without it.

    Raises:
        UserError: the folder is there already, the stage is not finished, or the checkpoint is damaged.
    """
    import torch

    from pipeline.distributed.process_group import alone
    from pipeline.evaluation.checkpoints import load_scored
    from pipeline.export.card import model_card
    from pipeline.export.export import export
    from pipeline.model.backbone import ONE_RANK

    target = to or context.folder / FOLDER
    if target.exists() and not context.force:
        raise UserError(f"export: {target} exists; name another folder with --to, or replace it with --force")
    label = checkpoint or context.stages[-1]
    if label == BASE:
        raise UserError("--checkpoint base: is the model that the run starts from; name a stage")
    if label in context.stages:
        context.folder.manifest(label)  # which is written when the stage is done
    scored = models_to_score(context, label)[-1]
    model = load_scored(scored, context.dense, context.dtype, alone("cpu"), ONE_RANK)
    of = getattr(torch, DTYPES[dtype]) if dtype else context.dtype
    card = str(model_card(_facts(context, label, of)))
    hf = context.dense if context.run.method.is_dense else context.upcycled / HF_FOLDER
    found = export(model, context.plan, hf, target, of, parity_samples(context), card)
    print(
        f"export: {label} as {target}, {found.parameters / 1e6:.1f} M parameters, {found.bytes / 1e9:.2f} GB; its "
        f"logits differ by at most {found.difference:.2g} (logits up to {found.largest:.0f}) on {found.tokens} tokens "
        "from the trained model's, fp32",
        flush=True,
    )
    trusts = "" if context.run.method.is_dense else ", trust_remote_code=True"
    print(f'load it: AutoModelForCausalLM.from_pretrained("{target}"{trusts})', flush=True)


def _facts(context: RunContext, label: str, dtype: "torch.dtype") -> "CardFacts":
    """What the card says of this checkpoint."""
    from pipeline.checkpoint.store import read_manifest
    from pipeline.export.card import CardFacts

    rows = None if context.run.method.is_dense else read_manifest(context.upcycled, UpcycledManifest).new_rows
    path = context.folder / EVALUATION_FILE if label in context.stages else context.folder.evaluation_of(label)
    is_folder = Path(context.run.model.path).is_dir()
    return CardFacts(
        run=context.run,
        plan=context.plan,
        label=label,
        evaluation=Evaluation.load_if_there(path),
        base_model=None if is_folder else context.run.model.path,
        dtype=str(dtype).removeprefix("torch."),
        new_tokens=0 if rows is None else rows.count,
    )
