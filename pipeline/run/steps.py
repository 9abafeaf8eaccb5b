"""The steps of a run, in order. To add a step is to add a record here."""

from collections.abc import Callable
from functools import partial

from pipeline.config.cluster import JobName
from pipeline.config.run import RunConfig
from pipeline.run import preparation, scoring, stages, upcycling
from pipeline.run.context import RunContext
from pipeline.run.reporting import write_report
from pipeline.run.step import Result, Step


def _report(context: RunContext, _ranks: object) -> Result:
    return write_report(context, STEP_NAMES)


def _has_experts(run: RunConfig) -> bool:
    return not run.method.is_dense


def _no_experts(run: RunConfig) -> str:
    return f"method {run.method.name} has no experts"


def _train(
    number: int, job: JobName, applies: Callable[[RunConfig], bool], without: Callable[[RunConfig], str]
) -> Step:
    return Step(
        f"stage{number}", verb="train", does="train a stage on all ranks", reads="upcycled/ and tokens",
        writes="stage1/ or stage2/", job=job, needs_ranks=True, applies=applies,
        without=without, inputs=partial(stages.stage_inputs, number=number), work=partial(stages.train, number=number),
        check=partial(stages.check_stage, number=number),
    )  # fmt: skip


STEPS = (
    Step(
        "tokenize", does="text to token shards", reads="data.*.path", writes="cache_dir/tokens/", job="tokenize",
        inputs=preparation.tokenize_inputs, work=preparation.tokenize, is_there=preparation.tokens_are_there,
        may_grow=True,
    ),
    Step(
        "similarity", does="how alike languages look to each layer", reads="tokens and the dense model",
        writes="similarity.json", job="prepare", alone=True, applies=preparation.is_measured,
        without=preparation.why_not_measured, inputs=preparation.similarity_inputs,
        work=preparation.measure_similarity, is_there=preparation.similarity_is_there,
    ),
    Step(
        "allocate", does="how many experts each layer gets",
        reads="similarity.json or experts.similarity, and the budget", writes="expert_plan.json", job="prepare",
        applies=_has_experts, without=_no_experts, inputs=preparation.allocate_inputs,
        work=preparation.allocate_experts,
    ),
    Step(
        "upcycle", does="the dense model to a DeepSpeed-MoE checkpoint", reads="model and expert_plan.json",
        writes="upcycled/", job="prepare", alone=True, applies=_has_experts, without=_no_experts,
        inputs=upcycling.upcycle_inputs, work=upcycling.upcycle_model, is_there=upcycling.upcycled_is_there,
    ),
    _train(1, "stage1", applies=lambda run: 1 in run.stage_numbers, without=stages.why_not_taught),
    _train(2, "stage2", applies=lambda run: 2 in run.stage_numbers, without=stages.why_not_reviewed),
    Step(
        "evaluate", does="bits per character on held-out text", reads="checkpoints and tokens",
        writes="evaluation.json", job="evaluate", inputs=scoring.evaluate_inputs, work=scoring.evaluate,
        may_grow=True, needs_ranks=True, has_work=scoring.has_work,
    ),
    Step(
        "report", does="what was measured, to look at", reads="the run's folder", writes="report.html",
        job="evaluate", inputs=lambda _context: {}, work=_report, keeps_manifest=False,
    ),
)  # fmt: skip
STEP_NAMES = tuple(step.name for step in STEPS)


def step_named(name: str) -> Step:
    """The step of this name."""
    return next(step for step in STEPS if step.name == name)


def steps_of(run: RunConfig) -> list[Step]:
    """The steps that a run has; one that says why it is left out is among them."""
    return [step for step in STEPS if step.applies(run) or step.without(run)]
