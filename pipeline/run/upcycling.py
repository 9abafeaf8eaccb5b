"""The step before training: the dense model, or the base run's, to the mixture that stage 1 starts from."""

from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError
from common.files import content_key
from data_prep.sample import sample_documents
from pipeline.records.checkpoint import UpcycledManifest
from pipeline.run.context import RunContext
from pipeline.run.step import Inputs, Result

if TYPE_CHECKING:
    import numpy as np

    from pipeline.method.new_tokens import ExtendedTokenizer

UPCYCLED_FORMAT = 2  # raised when what an upcycled folder holds changes
USAGE_SAMPLE = 4096  # tokens of each new set that say which experts are used most
PARITY_SAMPLE = 128  # tokens of each set for the upcycling receipt


def upcycle_inputs(context: RunContext) -> Inputs:
    """The model, the plan of experts, what new experts begin as, and the seed of the routers."""
    run, experts = context.run, context.run.experts
    return {
        "model": context.start,
        "plan": context.plan.experts_key,
        "init": experts.init,
        **({"drop_ratio": experts.drop_ratio} if experts.init == "drop" else {}),
        **({"noise": experts.noise} if experts.noise else {}),
        "seed": run.seed,
        **({} if context.base is None else {"router": run.experts.router}),
        **({} if _extended_tokenizer(context) is None else {"tokenizer": context.planned.tokenizer_key}),
    }


def _upcycled_name(context: RunContext) -> str:
    return content_key(upcycle_inputs(context) | {"format": UPCYCLED_FORMAT})


def upcycled_is_there(context: RunContext) -> bool:
    """Whether the cache still holds it, with files of experts if they are asked for."""
    from pipeline.checkpoint.store import read_manifest

    target = context.run.cache_dir / "upcycled" / _upcycled_name(context)
    if not target.is_dir():
        return False
    return not context.run.experts.write_copies or read_manifest(target, UpcycledManifest).holds_experts


def upcycle_model(context: RunContext, _ranks: object) -> Result:
    """Dense model and plan to a DeepSpeed-MoE checkpoint in the cache."""
    from pipeline.checkpoint.store import read_manifest

    run = context.run
    target = run.cache_dir / "upcycled" / _upcycled_name(context)
    if upcycled_is_there(context):
        print(f"upcycle: {target} is there already, skipped", flush=True)
    else:
        _write_upcycled(context, target)
    context.folder.link_upcycled(target)
    manifest = read_manifest(target, UpcycledManifest)
    parity = manifest.parity
    start = "dense model" if run.base is None else f"model of {run.base.run}"
    adds = context.base is not None and context.plan != context.base.plan
    rows = "" if not adds else "; the routers' new rows are random, so some tokens take new experts"
    print(
        f"upcycle: largest logit difference to the {start} {parity['max_abs_logit_difference']:.2g} "
        f"(logits up to {parity['max_abs_logit']:.0f}) on {parity['tokens']} tokens of real text, fp32{rows}",
        flush=True,
    )
    new = manifest.new_rows
    if new is not None and new.train:
        print(
            f"upcycle: {new.count:,} new tokens from id {new.first} on, whose rows start as the mean of their pieces' "
            "rows and train in stage 1",
            flush=True,
        )
    figures = manifest.model_dump(mode="json", include={"parity", "dense_parameters", "mlp_parameters"})
    return Result({"upcycled": target.name}, figures)


def _write_upcycled(context: RunContext, target: Path) -> None:
    """Upcycle the dense model, or expand the base run's."""
    from pipeline.checkpoint.store import read_manifest

    run, samples = context.run, parity_samples(context, by_own_tokenizer=context.base is None)
    if context.base is None or run.base is None:
        from pipeline.method.expert_init import ExpertInit
        from pipeline.method.upcycle import upcycle

        upcycle(
            context.dense, context.plan, samples, target,
            seed=run.seed, model_hash=context.model_hash, init=ExpertInit.of(run.experts),
            write_copies=run.experts.write_copies, tokenizer=_extended_tokenizer(context),
        )  # fmt: skip
        return
    import torch

    from pipeline.distributed.process_group import alone
    from pipeline.evaluation.checkpoints import load_scored
    from pipeline.method.expand import expand, most_used_experts
    from pipeline.model.backbone import ONE_RANK

    upcycled = context.base.upcycled
    manifest = read_manifest(upcycled, UpcycledManifest)
    if manifest.new_rows is not None and manifest.new_rows.tokenizer != context.planned.tokenizer_key:
        raise UserError(
            f"model.tokenizer: {run.model.tokenizer} has changed since {run.base.run} was upcycled with "
            "it; put the old one back"
        )
    dtype = getattr(torch, manifest.dtype)
    model = load_scored(context.start_model, context.dense, dtype, alone("cpu"), ONE_RANK)
    copied = None
    if run.experts.copy_of == "most_used":
        copied = most_used_experts(model, context.base.plan, _new_documents(context))
        print(f"upcycle: new experts are copies of the most used one, by layer: {' '.join(map(str, copied))}")
    expand(
        model, context.base.plan, context.plan, (upcycled, manifest), samples, target,
        seed=run.seed, key=context.start, router=run.experts.router, copied=copied,
        write_copies=run.experts.write_copies,
    )  # fmt: skip


def _extended_tokenizer(context: RunContext) -> "ExtendedTokenizer | None":
    """The run's tokenizer where it extends the dense model's own, else None."""
    from pipeline.method.new_tokens import ExtendedTokenizer

    folder = context.run.model.tokenizer
    new_tokens = None if folder is None else context.planned.encoders.new_tokens
    if folder is None or new_tokens is None:
        return None
    return ExtendedTokenizer(Path(folder), context.planned.tokenizer_key, new_tokens)


def _new_documents(context: RunContext) -> "list[np.ndarray]":
    """A sample of the new languages' training text, as much of each set."""
    sets = context.run.data.new
    documents = [sample_documents(context.planned, name, USAGE_SAMPLE) for name in sets]
    return [document.ids for found in documents for document in found]


def parity_samples(context: RunContext, *, by_own_tokenizer: bool = False) -> "np.ndarray":
    """The first tokens of each set's held-out text, [B, L].

    Args:
        context: the run.
        by_own_tokenizer: whether by the dense model's own tokenizer, where the run's extends it.
    """
    import numpy as np

    names = (*context.run.data.old, *context.run.data.new)
    shards = [context.store.held_out(name, by_own_tokenizer=by_own_tokenizer) for name in names]
    length = min(PARITY_SAMPLE, *(shard.num_tokens for shard in shards))
    return np.stack([shard.tokens[:length] for shard in shards])
