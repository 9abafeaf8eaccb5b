"""The steps that train: stage 1 and stage 2, on ranks."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from common.files import content_key, read_json, sha256_file
from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.run.context import RunContext
from pipeline.run.step import Inputs, Result

if TYPE_CHECKING:
    from pipeline.distributed.process_group import Ranks

NOT_A_RESULT = {"activation_checkpointing"}  # settings of a stage that change how it is computed, not what comes out


def stage1_inputs(context: RunContext) -> Inputs:
    """What stage 1's result depends on; not how it is spread over ranks, nor when it validates or saves."""
    return _inputs(context, 1)


def stage2_inputs(context: RunContext) -> Inputs:
    """As :func:`stage1_inputs`, with what stage 1 came to."""
    return _inputs(context, 2) | {"stage1": context.folder.hash_of("stage1")}


def _inputs(context: RunContext, number: int) -> Inputs:
    from pipeline.method.stages import find_stage

    run, data = context.run, context.run.data
    sets = find_stage(run, number).sets(data)
    return {
        "upcycled": context.folder.manifest("upcycle").outputs["upcycled"],
        "sets": {name: context.store.keys[name] for name in sets},
        "tokenizer": context.store.tokenizer_key,
        "plan": context.identity(f"stage{number}")["plan"],
        "weights": {name: [entry.weight, *(s.weight for s in entry.sources)] for name, entry in sets.items()},
        "temperature": data.temperature,
        "isolate_documents": data.isolate_documents,
        "seed": run.seed,
        "deepspeed": read_json(run.deepspeed),
        "bad_steps": run.bad_steps.model_dump(mode="json"),
        "settings": run.stage(number).model_dump(mode="json", exclude=NOT_A_RESULT),
    }


def check_stage1(context: RunContext) -> None:
    """What can be known of stage 1's data before any rank starts.

    Raises:
        UserError: a set has less than a sample.
    """
    _check_samples(context, 1)


def check_stage2(context: RunContext) -> None:
    """As :func:`check_stage1`, and whether the checkpoint of stage 1 is there.

    Raises:
        UserError: a set has less than a sample, or stage 1's checkpoint is gone.
    """
    from pipeline.checkpoint import read_manifest

    _check_samples(context, 2)
    try:
        read_manifest(stage1_checkpoint(context))
    except UserError as error:
        raise UserError(f"{error}; train stage 1 again with --force") from error


def _check_samples(context: RunContext, number: int) -> None:
    from pipeline.method.stages import find_stage
    from pipeline.training.sample_order import stage_order

    stage_order(context.store, context.run.data, find_stage(context.run, number), context.run.seed)


def stage1_checkpoint(context: RunContext) -> Path:
    """The checkpoint that stage 1 ended with."""
    return context.folder / "stage1" / context.folder.manifest("stage1").outputs["checkpoint"]


def train_stage1(context: RunContext, ranks: "Ranks | None") -> Result | None:
    """Train stage 1 on this rank; None if it was asked to stop before its end."""
    return _train(context, ranks, 1, stage1_inputs(context), None)


def train_stage2(context: RunContext, ranks: "Ranks | None") -> Result | None:
    """Train stage 2 on this rank; None if it was asked to stop before its end."""
    return _train(context, ranks, 2, stage2_inputs(context), stage1_checkpoint(context))


def _train(
    context: RunContext, ranks: "Ranks | None", number: int, inputs: Inputs, experts: Path | None
) -> Result | None:
    from pipeline.method.stages import find_stage
    from pipeline.training.inputs import StageInputs
    from pipeline.training.monitors import finish_wandb_run, keep_wandb_run
    from pipeline.training.train import train_stage

    assert ranks is not None
    run, name = context.run, f"stage{number}"
    target = context.folder / name
    if ranks.is_first and (context.force or run.checkpoint.resume == "never"):
        shutil.rmtree(target, ignore_errors=True)
        context.folder.forget(name)
    ranks.wait()
    if ranks.is_first and run.log.wandb:
        keep_wandb_run(target)
    identity: dict[str, Any] = context.identity(name) | {"settings": content_key(inputs)}
    if experts is not None:
        identity["stage1"] = {"tag": experts.name, "manifest": sha256_file(experts / "manifest.json")}
    stage_inputs = StageInputs(
        run, find_stage(run, number), context.plan, context.store, context.upcycled, target, identity, experts
    )
    figures = train_stage(stage_inputs, ranks)
    finish_wandb_run()
    return None if figures is None else Result({"checkpoint": figures["tag"]}, figures)


def check_parallel(context: RunContext, world_size: int, device: str) -> None:
    """What can be known of a run on so many ranks before any of them starts.

    Args:
        context: the run.
        world_size: ranks.
        device: cpu or cuda.

    Raises:
        UserError: ep_size, batch, DeepSpeed config or monitors do not fit.
    """
    from pipeline.method.stages import stages_of
    from pipeline.training.ds_config import batch_shape, read_ds_config
    from pipeline.training.monitors import check_monitors

    run = context.run
    read_ds_config(run.deepspeed)
    check_monitors(run.log)
    ParallelDims(world_size, run.parallel.ep_size)
    for stage in stages_of(run):
        batch_shape(run, stage.settings, world_size, device)
