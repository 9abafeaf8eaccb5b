"""Doing the steps of a run: here, in a process of their own, or on ranks."""

import time
from collections.abc import Sequence

from common.errors import met_by_all
from common.launch_environment import is_first_rank
from pipeline.distributed.device import device_type
from pipeline.distributed.launcher import check_room, run_verb, start_ranks
from pipeline.distributed.process_group import (
    Ranks,
    environment_world_size,
    join,
    under_launcher,
)
from pipeline.records.run_folder import ERRORS_FOLDER
from pipeline.run.checks import check_parallel
from pipeline.run.context import RunContext
from pipeline.run.scoring import has_work, score
from pipeline.run.step import Step
from pipeline.run.tasks import Asked, TaskScoring, score_tasks


def run_steps(context: RunContext, steps: Sequence[Step], *, from_the_first: bool) -> None:
    """Do every step that is not done yet, in order; end early where one stops before its end.

    Args:
        context: the run.
        steps: which.
        from_the_first: whether they begin with the run's first step.
    """
    trains = any(step.needs_ranks for step in steps)
    if from_the_first or trains:
        check_parallel(context, context.run.parallel.ranks, device_type())
    if trains and not under_launcher():
        check_room(context.run.parallel.ranks)
    left = list(steps)
    while left:
        step = left.pop(0)
        if step.is_done(context):
            continue
        if step.alone:
            run_verb(step.verb, context.folder.run_file, force=context.force)
            continue
        together = [step]
        while step.needs_ranks and left and left[0].needs_ranks:
            following = left.pop(0)
            if following.applies(context.run):
                together.append(following)
            else:
                following.is_done(context)  # says why the run does not have it
        stopped = do_together(context, together)
        if stopped is not None:
            print(
                f"{stopped.name}: stopped before its end; the same command resumes from its last checkpoint",
                flush=True,
            )
            return


def do_together(context: RunContext, steps: Sequence[Step]) -> Step | None:
    """Do one step, or steps on ranks that are started once for all of them.

    Args:
        context: the run.
        steps: one after the other. The first is not done; later ones may be.

    Returns:
        The one that stopped before its end, if any.
    """
    first = steps[0]
    if not first.needs_ranks or under_launcher():
        return next((step for step in steps if not do_step(context, step)), None)
    if first.check is not None:
        first.check(context)  # names a mistake before any rank starts
    if not first.has_work(context):
        return None if finish_step(context, first, None) else first
    start_ranks(_arguments(context, steps), context.run.parallel.ranks)
    return next((step for step in steps if not context.folder.has_manifest(step.name)), None)


def do_step(context: RunContext, step: Step) -> bool:
    """Do a step that is not done: on this rank under a launcher, by starting the run's ranks, or here.

    Returns:
        Whether it came to its end.
    """
    if not step.needs_ranks:
        return finish_step(context, step, None)
    if not under_launcher():
        return do_together(context, [step]) is None
    if step.check is not None and is_first_rank():
        step.check(context)
    ranks = _join(context)
    is_finished = finish_step(context, step, ranks)
    ranks.wait()  # until the first one has written the manifest
    return is_finished


def _join(context: RunContext) -> Ranks:
    return join(context.run.parallel.timeout_minutes, context.folder / ERRORS_FOLDER)


def _arguments(context: RunContext, steps: Sequence[Step]) -> list[str]:
    """What does these steps on ranks: stages, the evaluation, or stages and then the evaluation."""
    stages = [step.name.removeprefix("stage") for step in steps if step.verb == "train"]
    options = ["--stage", *stages] if len(stages) == 1 else []
    options += ["--evaluate"] if stages and steps[-1].verb == "evaluate" else []
    return [steps[0].verb, str(context.folder.run_file), *options, *_force(context)]


def _force(context: RunContext) -> list[str]:
    if not context.force:
        return []
    return ["--force" if context.redo else "--changed"]


def finish_step(context: RunContext, step: Step, ranks: Ranks | None) -> bool:
    """Do a step's work in this process, on all ranks that are given, and write its manifest.

    Returns:
        Whether it came to its end.
    """
    started, keeps = time.monotonic(), step.keeps_manifest and is_first_rank()
    done_with = step.done_with(context) if keeps else None  # of now, not of when the work has ended
    result = step.work(context, ranks)
    if result is not None and done_with is not None:
        figures = {"seconds": round(time.monotonic() - started, 1)} | result.figures
        context.folder.finish(step.name, done_with, result.outputs, figures)
    return result is not None


def train_steps(context: RunContext, steps: Sequence[Step]) -> None:
    """Train stages one after the other, and evaluate if that is among the steps; end early where one stops."""
    world_size = environment_world_size() if under_launcher() else context.run.parallel.ranks
    for step in steps:
        with met_by_all():
            check_parallel(context, world_size, device_type())
            is_done = step.is_done(context)
        if not is_done and not do_step(context, step):
            return


def evaluate_tasks(context: RunContext, step: Step, asked: Asked) -> None:
    """Score tasks of lm-eval's, and before them what has not been scored of the held-out text.

    Args:
        context: the run.
        step: the one that evaluates.
        asked: which tasks, of which models.

    Raises:
        UserError: there is no such task or checkpoint, or a task's data is not at hand.
    """
    scoring = None if under_launcher() else TaskScoring(context, asked)  # names a mistake before any rank starts
    if scoring is not None and (has_work(context, asked.tag) or scoring.missing()):
        words = ["evaluate", str(context.folder.run_file), *asked.words, *_force(context)]
        start_ranks(words, context.run.parallel.ranks)
        return
    evaluate(context, step, asked.tag)
    if scoring is None:
        score_tasks(context, asked, _join(context))
    else:
        scoring.write()


def evaluate(context: RunContext, step: Step, tag: str | None) -> None:
    """Score the held-out text: by the last checkpoints, unless that is done, or by the one that the user names."""
    if tag is not None:
        evaluate_named(context, tag)
    elif not step.is_done(context):
        do_step(context, step)


def evaluate_named(context: RunContext, tag: str) -> None:
    """Score one checkpoint that the user names, and print the table.

    Raises:
        UserError: there is no such checkpoint, or it is of another model, plan or tokenizer.
    """
    from pipeline.report.result_table import result_table

    if not under_launcher() and has_work(context, tag):  # names a mistake before any rank starts
        words = ["evaluate", str(context.folder.run_file), "--checkpoint", tag, *_force(context)]
        start_ranks(words, context.run.parallel.ranks)
        return
    ranks = _join(context) if under_launcher() else None
    result = score(context, tag, ranks)
    if result is not None:
        print(f"{result_table(result)}\nwritten: {context.folder.evaluation_of(tag)}", flush=True)
