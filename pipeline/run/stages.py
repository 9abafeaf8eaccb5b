"""The steps that train a stage, on ranks."""

from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError
from common.files import content_key, read_json, sha256_file
from pipeline.config.run import RunConfig, StageConfig
from pipeline.records.checkpoint import ExpertsFrom
from pipeline.records.step_manifest import StepInputs
from pipeline.run.checks import sample_warnings, warn_of_slow_bf16
from pipeline.run.context import RunContext
from pipeline.run.shared_stage import take_shared_stage
from pipeline.run.step import Inputs, Result

if TYPE_CHECKING:
    from pipeline.distributed.process_group import Ranks
    from pipeline.method.stage import Stage

NOT_A_RESULT = {"activation_checkpointing"}  # settings of a stage that change how it is computed, not what comes out
OF_ROUTERS = {  # settings that a model without routers does not have
    "lpr", "lpr_groups", "lpr_weight", "z_loss_weight", "balance", "bias_update_rate", "balance_weight",
    "balance_scale", "balance_statistics",
}  # fmt: skip
# Of a stage; where they are as by default, runs of before them have the same result.
ADDED_LATER = {"lpr_groups", "z_loss_weight", "router_kl_weight", "balance", "bias_update_rate"}


def stage_inputs(context: RunContext, number: int) -> Inputs:
    """What a stage's result depends on; not how it is spread over ranks, nor when it validates or saves."""
    from pipeline.training import sample_order

    run, stage = context.run, context.stage(number)
    sets = stage.sets(run.data)
    inputs = {
        **_model_inputs(context, stage),
        "sets": {name: context.store.keys[name] for name in sets},
        "tokenizer": context.store.tokenizer_key,
        "weights": {name: [entry.weight, *(s.weight for s in entry.sources)] for name, entry in sets.items()},
        "sample_order": sample_order.FORMAT,
        "temperature": run.data.temperature,
        "isolate_documents": run.data.isolate_documents,
        "seed": run.seed,
        "deepspeed": read_json(run.ds_config_file),
        "bad_steps": run.bad_steps.model_dump(mode="json"),
        "settings": result_settings(stage.settings, routers=not run.method.is_dense),
    }
    before = _stage_before(run, stage)
    if before is not None:
        inputs[before] = context.folder.hash_of(before)
    return inputs


def _stage_before(run: RunConfig, stage: "Stage") -> str | None:
    """The stage of the run whose checkpoint a stage starts from; None if that is what was upcycled."""
    return f"stage{stage.starts_from}" if stage.starts_from in run.stage_numbers else None


def _model_inputs(context: RunContext, stage: "Stage") -> Inputs:
    """What the stage's model follows from, up to the checkpoint of an earlier stage."""
    method = context.run.method
    if method.is_dense:
        return {"model": context.start, "method": {"name": method.name, **method.options}}
    upcycled = context.folder.manifest("upcycle").outputs["upcycled"]
    return {"upcycled": upcycled, "plan": stage.plan_key(context.plan)}


def why_not_taught(run: RunConfig) -> str:
    """Why a run has no stage 1; empty if it has."""
    return "" if 1 in run.stage_numbers else "experts.allocation keep adds no experts to train"


def why_not_reviewed(run: RunConfig) -> str:
    """Why a run does not have the stage 2 that it has settings of; empty if it has, or has none."""
    if run.stage2 is None or not run.method.is_dense:
        return ""
    return f"method {run.method.name} has no routers to review"


def result_settings(settings: StageConfig, *, routers: bool = True) -> Inputs:
    """A stage's settings that its result depends on; without options at their defaults that runs of before lacked.

    Args:
        settings: of the stage.
        routers: whether its model has any.
    """
    defaults = {name: field.default for name, field in type(settings).model_fields.items() if name in ADDED_LATER}
    as_before = {name for name, default in defaults.items() if getattr(settings, name) == default}
    return settings.model_dump(mode="json", exclude=NOT_A_RESULT | as_before | (set() if routers else OF_ROUTERS))


def check_stage(context: RunContext, number: int) -> None:
    """What can be known of a stage, and of those after it, before any rank starts.

    Raises:
        UserError: a set has less than a sample, or the checkpoint that the stage starts from is gone.
    """
    from pipeline.checkpoint.store import read_files

    warn_of_slow_bf16(context)
    for line in sample_warnings(context, [later for later in context.run.stage_numbers if later >= number]):
        print(f"warning: {line}", flush=True)
    experts = _starting_checkpoint(context, number)
    if experts is not None:
        try:
            read_files(experts)
        except UserError as error:
            raise UserError(f"{error}; train {experts.parent.name} again with --force") from error


def _starting_checkpoint(context: RunContext, number: int) -> Path | None:
    """The checkpoint that holds the experts which the stage starts from; None if they are as upcycled."""
    before = _stage_before(context.run, context.stage(number))
    if before is None:
        return None
    return context.folder / before / context.folder.manifest(before).outputs["checkpoint"]


def train(context: RunContext, ranks: "Ranks | None", number: int) -> Result | None:
    """Train a stage on this rank; None if it was asked to stop before its end."""
    from pipeline.checkpoint.store import MANIFEST
    from pipeline.training.inputs import StageInputs
    from pipeline.training.monitors import finish_wandb_run, keep_wandb_run
    from pipeline.training.train import train_stage

    assert ranks is not None
    run, stage = context.run, context.stage(number)
    target = context.folder / stage.name
    done_with = StepInputs(inputs=stage_inputs(context, number), run=context.settings)
    anew, shared = context.redo or run.checkpoint.resume == "never", None
    if ranks.is_first:
        context.folder.make_room(stage.name, done_with, anew=anew)
        shared = take_shared_stage(context.folder, done_with) if number == 1 and not anew else None
    shared = ranks.agreed(shared)
    if shared is not None:
        return Result(shared.outputs, shared.figures)
    if ranks.is_first and run.log.wandb:
        keep_wandb_run(target)
    experts = _starting_checkpoint(context, number)
    origin = experts and ExpertsFrom(tag=experts.name, manifest=sha256_file(experts / MANIFEST))
    identity = context.identity(number).model_copy(
        update={"settings": content_key(done_with.inputs), "stage1": origin}
    )
    inputs = StageInputs(
        run, stage, context.plan, context.store, context.untrained, target, identity, done_with, context.dims,
        experts,
    )  # fmt: skip
    figures = train_stage(inputs, ranks)
    finish_wandb_run()
    if figures is None:
        return None
    warnings = sample_warnings(context, [number]) if ranks.is_first else []
    return Result({"checkpoint": figures["tag"]}, figures | {"warnings": warnings})
