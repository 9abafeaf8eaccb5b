"""What a model scores on one of lm-eval's tasks: a file of the cache of scores, and a part of ``evaluation.json``."""

from pipeline.records.record import Record


class Figure(Record):
    """One metric.

    Attributes:
        value: as lm-eval computes it.
        error: its standard error; None where none is known.
        higher_is_better: None where the task does not say.
    """

    value: float
    error: float | None
    higher_is_better: bool | None


class TaskScore(Record):
    """One model on one task, or on a group of tasks that has figures of its own.

    Attributes:
        of: names the weights, and how they were computed with: see :func:`pipeline.evaluation.task_scores.model_key`.
        version: of the task; of a run's held-out text, a hash of it.
        lm_eval: version of the package.
        few_shot: examples before each question; -1 where the tasks of a group have different numbers.
        samples: how many documents.
        metrics: by name, with the filter of answers after a comma where it is not "none".
        part_of: the group whose figures sum it up; empty where there is none.
    """

    of: str
    version: str
    lm_eval: str
    few_shot: int
    samples: int
    metrics: dict[str, Figure]
    part_of: str = ""

    def is_like(self, other: "TaskScore") -> bool:
        """Whether the other is of the same questions, asked in the same way."""
        return (self.version, self.few_shot, self.samples) == (other.version, other.few_shot, other.samples)


TaskScores = dict[str, dict[str, TaskScore]]  # by task, by checkpoint
