"""The step that scores: the base model and the stages' last checkpoints, or one that the user names."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from common.files import content_key
from data_prep.manifest import HELD_OUT, OWN_HELD_OUT
from pipeline.records.evaluation import BASE, Evaluation
from pipeline.records.run_folder import EVALUATION_FILE
from pipeline.records.task_score import TaskScores
from pipeline.run.context import RunContext
from pipeline.run.step import Inputs, Result
from pipeline.run.tokenizers import begins_of

if TYPE_CHECKING:
    from pipeline.distributed.process_group import Ranks
    from pipeline.evaluation.checkpoints import Scored
    from pipeline.evaluation.evaluate import Evaluator, Work


def evaluate_inputs(context: RunContext) -> Inputs:
    """The sets, the model, the window, the prompts, and what the stages came to."""
    evaluate = context.run.evaluate
    return {
        "sets": held_out_keys(context),
        "model": context.start,
        "window": evaluate.window,
        "stages": {stage: context.folder.hash_of(stage) for stage in context.stages},
        **({"prompts": [evaluate.prompts, evaluate.new_tokens]} if evaluate.prompts else {}),
    }


def held_out_keys(context: RunContext) -> dict[str, str]:
    """By set, a hash of the documents that are scored, by the model's own tokenizer: the run may extend it."""
    part = HELD_OUT if context.store.own_tokenizer_key is None else OWN_HELD_OUT
    files = {name: one.manifest.files for name, one in context.store.sets.items()}
    return {name: content_key([found[f"{part}.bin"], found[f"{part}.jsonl"]]) for name, found in files.items()}


def has_work(context: RunContext, tag: str | None = None) -> bool:
    """Whether there is anything to compute, rather than to put together.

    Raises:
        UserError: there is no such checkpoint, or it is of another model, plan or tokenizer.
    """
    return bool(_missing(context, evaluator(context), models_to_score(context, tag)))


def evaluate(context: RunContext, ranks: "Ranks | None") -> Result:
    """Score what has not been scored, and write evaluation.json."""
    score(context, None, ranks)
    return Result()


def score(context: RunContext, tag: str | None, ranks: "Ranks | None") -> Evaluation | None:
    """Score the last checkpoints, or the one that the user names, and write what came of it.

    Args:
        context: the run.
        tag: which checkpoint; None for the last of each stage.
        ranks: those that compute; None where everything has been computed.

    Returns:
        What was written; None on ranks other than the first.

    Raises:
        UserError: there is no such checkpoint, or it is of another model, plan or tokenizer.
    """
    models, scoring = models_to_score(context, tag), evaluator(context)
    if ranks is not None:
        scoring.score(models, _missing(context, scoring, models), ranks, context.dims)
        if not ranks.is_first:
            return None
    result, path = scoring.result(models, context.untrained.parameter_counts()), evaluation_path(context, tag)
    before = Evaluation.load_if_there(path)
    if before is not None:
        result = result.model_copy(update={"tasks": tasks_that_hold(context, before.tasks, models)})
    result.save(path)
    return result


def evaluation_path(context: RunContext, tag: str | None) -> Path:
    """Where it is written what a run's models, or the one that a user names, were scored at."""
    return context.folder / EVALUATION_FILE if tag is None else context.folder.evaluation_of(tag)


def tasks_that_hold(
    context: RunContext, before: TaskScores, models: "Sequence[Scored]", now: TaskScores | None = None
) -> TaskScores:
    """Of earlier scores on tasks those that are of these models and of the run's text; and those of now."""
    from pipeline.evaluation.held_out_tasks import task_of_set, version_of
    from pipeline.evaluation.task_scores import kept_tasks, model_key

    keys = {model.label: model_key(model, context.run.evaluate.window, context.dtype) for model in models}
    versions = {task_of_set(name): version_of(text) for name, text in held_out_keys(context).items()}
    return kept_tasks(before, keys, versions, now)


def _missing(context: RunContext, scoring: "Evaluator", models: "list[Scored]") -> "dict[str, Work]":
    """What is to be scored: all of it where the user forces a step whose inputs did not change."""
    if context.redo:
        return scoring.everything(models)
    return scoring.missing(models)


def evaluator(context: RunContext) -> "Evaluator":
    """What scores this run's models."""
    from pipeline.evaluation.continuations import Continuations
    from pipeline.evaluation.evaluate import Evaluator
    from pipeline.evaluation.score_cache import ScoreCache

    run = context.run
    return Evaluator(
        run, context.plan, context.store, held_out_keys(context), dense=context.dense, dtype=context.dtype,
        cache=ScoreCache(run.cache_dir / "scores", run.evaluate.window, str(context.dtype)),
        continuations=Continuations(
            run.evaluate.prompts, run.evaluate.new_tokens, partial(begins_of, context),
            run.cache_dir / "continuations", context.dtype,
        ),
    )  # fmt: skip


def models_to_score(context: RunContext, tag: str | None) -> "list[Scored]":
    """The base model, and the stages' last checkpoints or the one that is named.

    Raises:
        UserError: there is no such checkpoint, or it is of another model, plan or tokenizer.
    """
    from pipeline.evaluation.checkpoints import checkpoint_to_score

    folders = {stage: context.folder / stage for stage in context.stages}
    identities = {number: context.identity(number) for number in context.run.stage_numbers}
    labels = [label for label in ([tag] if tag else context.stages) if label != BASE]
    found = (checkpoint_to_score(folders, one, identities, context.untrained) for one in labels)
    return [context.start_model, *found]
