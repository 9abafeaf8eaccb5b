"""The steps of a run, in order. To add a step is to add a record here."""

from pipeline.config.run import RunConfig
from pipeline.run import preparation, scoring, stages
from pipeline.run.context import RunContext
from pipeline.run.reporting import write_report
from pipeline.run.step import Inputs, Result, Step


def _has_old(run: RunConfig) -> bool:
    return bool(run.data.old)


def _has_stage2(run: RunConfig) -> bool:
    return run.stage2 is not None


def _no_inputs(_context: RunContext) -> Inputs:
    return {}


def _report(context: RunContext, _ranks: object) -> Result:
    return write_report(context, STEP_NAMES)


STEPS = (
    Step(
        "tokenize",
        verb="tokenize",
        does="text to token shards.\nReads data.*.path; writes cache_dir/tokens/.",
        inputs=preparation.tokenize_inputs,
        work=preparation.tokenize,
        is_there=preparation.tokens_are_there,
        may_grow=True,
        job="tokenize",
    ),
    Step(
        "similarity",
        verb="similarity",
        does="how alike languages look to each layer.\nReads tokens and the dense model; writes similarity.json.",
        applies=_has_old,
        without="no old set to compare with",
        inputs=preparation.similarity_inputs,
        work=preparation.measure_similarity,
        alone=True,
        job="prepare",
    ),
    Step(
        "allocate",
        verb="allocate",
        does="how many experts each layer gets.\nReads similarity.json and the budget; writes expert_plan.json.",
        inputs=preparation.allocate_inputs,
        work=preparation.allocate_experts,
        job="prepare",
    ),
    Step(
        "upcycle",
        verb="upcycle",
        does="the dense model to a DeepSpeed-MoE checkpoint.\nReads model and expert_plan.json; writes upcycled/.",
        inputs=preparation.upcycle_inputs,
        work=preparation.upcycle_model,
        is_there=preparation.upcycled_is_there,
        alone=True,
        job="prepare",
    ),
    Step(
        "stage1",
        verb="train",
        does="train a stage on all ranks.\nReads upcycled/ and tokens; writes stage1/ or stage2/.",
        inputs=stages.stage1_inputs,
        work=stages.train_stage1,
        check=stages.check_stage1,
        needs_ranks=True,
        job="stage1",
    ),
    Step(
        "stage2",
        verb="train",
        does="train a stage on all ranks.\nReads upcycled/ and tokens; writes stage1/ or stage2/.",
        applies=_has_stage2,
        inputs=stages.stage2_inputs,
        work=stages.train_stage2,
        check=stages.check_stage2,
        needs_ranks=True,
        job="stage2",
    ),
    Step(
        "evaluate",
        verb="evaluate",
        does="bits per character on held-out text.\nReads checkpoints and tokens; writes evaluation.json.",
        inputs=scoring.evaluate_inputs,
        work=scoring.evaluate,
        needs_ranks=True,
        has_work=scoring.has_work,
        may_grow=True,
        job="evaluate",
    ),
    Step(
        "report",
        verb="report",
        does="what was measured, to look at.\nReads the run's folder; writes report.html.",
        inputs=_no_inputs,
        work=_report,
        keeps_manifest=False,
        job="evaluate",
    ),
)
STEP_NAMES = tuple(step.name for step in STEPS)
VERBS = {step.verb: step.does for step in STEPS}  # of the command line


def step_named(name: str) -> Step:
    """The step of this name."""
    return next(step for step in STEPS if step.name == name)


def steps_of(run: RunConfig) -> list[Step]:
    """The steps that a run has; one that says why it is left out is among them."""
    return [step for step in STEPS if step.applies(run) or step.without]
