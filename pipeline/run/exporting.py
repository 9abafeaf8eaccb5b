"""The verb ``export``: a checkpoint of a run as a Hugging Face folder."""

from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError
from common.files import read_json
from pipeline.records.checkpoint import HF_FOLDER, UpcycledManifest
from pipeline.records.evaluation import BASE, Evaluation
from pipeline.records.expansion import Expansion
from pipeline.records.run_folder import EVALUATION_FILE
from pipeline.run.context import RunContext
from pipeline.run.scoring import models_to_score
from pipeline.run.upcycling import parity_samples

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from pipeline.export.card import CardFacts
    from pipeline.export.export import Exported
    from pipeline.export.form import Form
    from pipeline.export.native.form import NativeForm
    from pipeline.export.origin import Origin

FOLDER = "export"
DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}
NATIVE = ("auto", "mixtral", "qwen2_moe", "qwen3_moe", "ernie4_5_moe")
SERVE = ("vllm-fused",)


def export_run(
    context: RunContext,
    checkpoint: str | None,
    dtype: str | None,
    to: Path | None,
    native: str | None = None,
    serve: str | None = None,
    instruct: str | None = None,
) -> None:
    """Export a checkpoint, and say how far its logits are from those of the model in training.

    Args:
        context: the run.
        checkpoint: which one, as ``evaluate --checkpoint`` names them; the last stage's last without it.
        dtype: of the weights, one of ``DTYPES``; the run's own without it.
        to: the folder to make; ``export/`` in the run's folder without it.
        native: one of ``NATIVE``, an architecture of transformers that loads without code of the folder.
        serve: one of ``SERVE``, a program that is to serve it by a faster path of its own.
        instruct: a folder or hub id of the dense model after instruction tuning, whose difference is added.

    Raises:
        UserError: the folder is there already, the stage is not finished, the checkpoint is damaged, the architecture
            can't say the mixture, or the instruct model is not one of this dense model.
    """
    import torch

    from pipeline.distributed.process_group import alone
    from pipeline.evaluation.checkpoints import load_scored
    from pipeline.export.card import model_card
    from pipeline.export.export import export
    from pipeline.export.native.form import NativeForm
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
    of = getattr(torch, DTYPES[dtype]) if dtype else context.dtype
    model = load_scored(scored, context.dense, _loading_dtype(context, of), alone("cpu"), ONE_RANK)
    template = None if instruct is None else _graft(context, model, instruct)
    form = _form(context, model, native, serve)
    card = str(model_card(_facts(context, label, of, form, instruct)))
    hf = context.dense if context.run.method.is_dense else context.upcycled / HF_FOLDER
    is_base = instruct is None and not context.run.method.is_dense  # which a further round can start from
    origin = _origin(context, label, model, of, form) if is_base else None
    found = export(model, context.plan, hf, target, of, parity_samples(context), card, form, template, origin)
    print(
        f"export: {label} as {target}, {found.parameters / 1e6:.1f} M parameters, {found.bytes / 1e9:.2f} GB; its "
        f"logits differ by at most {found.difference:.2g} (logits up to {found.largest:.0f}) on {found.tokens} tokens "
        f"from the {'trained' if instruct is None else 'grafted'} model's, fp32",
        flush=True,
    )
    trusts = "" if context.run.method.is_dense else ", trust_remote_code=True"
    if isinstance(form, NativeForm):
        print(_native_line(form, found, of), flush=True)
        trusts = ""
    print(f'load it: AutoModelForCausalLM.from_pretrained("{target}"{trusts})', flush=True)


def _graft(context: RunContext, model: "PreTrainedModel", instruct: str) -> str | None:
    """Add what instruction tuning added to the dense model; returns the instruct model's chat template.

    Raises:
        UserError: it is not an instruct model of this dense model.
    """
    from pipeline.config.run import ModelConfig
    from pipeline.export.graft import chat_template, graft
    from pipeline.method.lora import without_adapters
    from pipeline.model.model_folder import model_folder

    try:
        folder = model_folder(ModelConfig(path=instruct))
    except UserError as error:
        raise UserError(str(error).replace("model.path:", "--graft:", 1)) from error
    changed = graft(without_adapters(model), context.dense, folder)
    print(f"graft: {instruct} minus {context.run.model.path}, added to {changed:,} weights (experimental)", flush=True)
    return chat_template(folder)


def _loading_dtype(context: RunContext, written: "torch.dtype") -> "torch.dtype":
    """What the model is loaded in: the run's, but fp32 where weights of another dtype are to be written in fp32."""
    import torch

    if context.run.method.is_dense or written != torch.float32:
        return context.dtype
    same = _manifest(context).dtype == str(context.dtype).removeprefix("torch.")
    return context.dtype if same else torch.float32


def _manifest(context: RunContext) -> UpcycledManifest:
    from pipeline.checkpoint.store import read_manifest

    return read_manifest(context.upcycled, UpcycledManifest)


def _origin(context: RunContext, label: str, model: "PreTrainedModel", dtype: "torch.dtype", form: "Form") -> "Origin":
    """What an import needs to know besides the weights."""
    from pipeline.export.origin import Origin
    from pipeline.export.own_code import mixture_config

    known, config = _manifest(context), mixture_config(model, context.plan)
    config_file = read_json(context.upcycled / HF_FOLDER / "config.json")
    expansion = Expansion(
        run=context.run.name,
        checkpoint=label,
        form=form.name,
        config={key: value for key, value in config_file.items() if key != "_name_or_path"},
        upcycled=known.model_copy(update={"files": {}, "plan": context.plan.model_dump(mode="json")}),
        has_classifiers=bool(config["classifier_layers"]),
        selection_biases=config["selection_biases"],
        training_dtype=str(context.dtype).removeprefix("torch."),
        written_dtype=str(dtype).removeprefix("torch."),
    )
    return Origin(expansion, None if known.new_rows is None else context.dense)


def _form(context: RunContext, model: "PreTrainedModel", native: str | None, serve: str | None) -> "Form":
    """What the folder is written as.

    Raises:
        UserError: it can't say the mixture, or the model is dense.
    """
    from pipeline.export.native.choose import choose_form
    from pipeline.export.native.mixture import Mixture
    from pipeline.export.own_code import OwnCode, VllmFused

    if native is None and serve is None:
        return OwnCode()
    option = f"--native {native}" if native else f"--serve {serve}"
    if native and serve:
        raise UserError(
            f"export --native {native} --serve {serve}: the second is for a folder with own code; give one"
        )
    method = context.run.method
    if method.is_dense and native not in (None, NATIVE[0]):
        raise UserError(f"export {option}: method {method.name} trains a dense model, not a mixture; leave it out")
    if method.is_dense:
        print(f"export: {option} is not needed: method {method.name}'s model is dense, which transformers knows")
        return OwnCode()
    if native:
        return choose_form(native, Mixture(model, context.plan))
    reason = VllmFused.why_not(model, context.plan)
    if reason is not None:
        raise UserError(f"export {option}: vLLM's fused path can't serve this model: {reason}; leave --serve out")
    return VllmFused()


def _native_line(form: "NativeForm", found: "Exported", dtype: "torch.dtype") -> str:
    """What an architecture costs, and what it computes otherwise."""
    import torch

    name = str(dtype).removeprefix("torch.")
    line = f"native: {form.name}, {found.added / 1e6:.1f} M of the parameters are copies and zeros that it needs"
    if not form.rounds_routers:
        return f"{line}; programs that leave its selection biases out, as vLLM 0.32 on CPUs, compute something else"
    caveat = "routers are computed in the dtype that it is loaded in, so that tokens whose experts score alike"
    if dtype == torch.float32:
        return f"{line}; {caveat} may take others in bf16"
    return (
        f"{line}; {caveat} may take others: in fp32 with routers rounded to {name} its logits differ by up to "
        f"{found.rounded_difference:.2g}"
    )


def _facts(context: RunContext, label: str, dtype: "torch.dtype", form: "Form", instruct: str | None) -> "CardFacts":
    """What the card says of this checkpoint."""
    from pipeline.export.card import CardFacts
    from pipeline.export.native.form import NativeForm

    rows = None if context.run.method.is_dense else _manifest(context).new_rows
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
        instruct=None if instruct is None else Path(instruct).name if Path(instruct).is_dir() else instruct,
        native=form.architecture if isinstance(form, NativeForm) else None,
    )
