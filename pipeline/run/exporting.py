"""The verb ``export``: a checkpoint of a run as a Hugging Face folder."""

from pathlib import Path

from common.errors import UserError
from pipeline.records.evaluation import BASE
from pipeline.run.context import RunContext
from pipeline.run.preparation import parity_samples

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
    from pipeline.evaluation.checkpoints import checkpoint_to_score, load_scored
    from pipeline.export.export import export
    from pipeline.method.upcycle import HF_FOLDER
    from pipeline.model.backbone import ONE_RANK

    target = to or context.folder / FOLDER
    if target.exists() and not context.force:
        raise UserError(f"export: {target} exists; name another folder with --to, or replace it with --force")
    label = checkpoint or context.stages[-1]
    if label == BASE:
        raise UserError("--checkpoint base: is the model that the run starts from; name a stage")
    if label in context.stages:
        context.folder.manifest(label)  # which is written when the stage is done
    folders = {stage: context.folder / stage for stage in context.stages}
    identities = {number: context.identity(number) for number in context.run.stage_numbers}
    scored = checkpoint_to_score(folders, label, identities, context.upcycled, context.plan)
    model = load_scored(scored, context.dense, context.dtype, alone("cpu"), ONE_RANK)
    of = getattr(torch, DTYPES[dtype]) if dtype else context.dtype
    found = export(model, context.plan, context.upcycled / HF_FOLDER, target, of, parity_samples(context))
    print(
        f"export: {label} as {target}, {found.parameters / 1e6:.1f} M parameters, {found.bytes / 1e9:.2f} GB; its "
        f"logits differ by at most {found.difference:.2g} (logits up to {found.largest:.0f}) on {found.tokens} tokens "
        "from the trained model's, fp32",
        flush=True,
    )
    print(f'load it: AutoModelForCausalLM.from_pretrained("{target}", trust_remote_code=True)', flush=True)
