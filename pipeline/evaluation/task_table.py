"""Scores on lm-eval's tasks as rows: of the table on the screen, the report and the card."""

from collections.abc import Mapping

from common.text_table import aligned
from pipeline.records.evaluation import Evaluation
from pipeline.records.task_score import Figure, TaskScore, TaskScores

MISSING = "-"
DIRECTIONS = {True: ", higher is better", False: ", lower is better", None: ""}
MIXED = "mixed"  # of a group whose tasks have different numbers of examples


def task_table(evaluation: Evaluation) -> str:
    """A row for each metric of each task, with its standard errors; a group's row stands for its tasks'."""
    rows = task_rows(evaluation.tasks, {label: label for label in evaluation.checkpoints})
    if len(rows) == 1:
        return "no task has a figure"
    return f"lm-eval {_versions(evaluation.tasks)}; +- is a standard error\n{aligned(rows, numbers_from=2)}"


def task_rows(tasks: TaskScores, checkpoints: Mapping[str, str]) -> list[list[str]]:
    """Cells of text, the heading first.

    Args:
        tasks: scores by task, by checkpoint.
        checkpoints: the headings of their columns.
    """
    rows = [["task", "metric", "examples", "documents", *checkpoints.values()]]
    for name, scores in shown_tasks(tasks).items():
        first = next(iter(scores.values()))
        for metric, figure in first.metrics.items():
            cells = [_cell(scores.get(label), metric) for label in checkpoints]
            rows.append(
                [name, f"{metric}{DIRECTIONS[figure.higher_is_better]}", examples(first), f"{first.samples:,}", *cells]
            )
    return rows


def shown_tasks(tasks: TaskScores) -> TaskScores:
    """Those that no group sums up, by name."""
    return {name: tasks[name] for name in sorted(tasks) if not any(one.part_of for one in tasks[name].values())}


def examples(score: TaskScore) -> str:
    """How many stand before each question."""
    return MIXED if score.few_shot < 0 else str(score.few_shot)


def with_error(figure: Figure, sign: str = " +-") -> str:
    """A value with its standard error, where there is one."""
    return f"{figure.value:.4f}" + ("" if figure.error is None else f"{sign}{figure.error:.4f}")


def _cell(score: TaskScore | None, metric: str) -> str:
    return MISSING if score is None or metric not in score.metrics else with_error(score.metrics[metric])


def _versions(tasks: TaskScores) -> str:
    found = sorted({score.lm_eval for scores in tasks.values() for score in scores.values()})
    return ", ".join(found)
