"""``evaluate --tasks``: models of a run on lm-eval's tasks, beside their bits per character."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.errors import AgreedError, UserError
from common.files import write_json
from pipeline.records.evaluation import Evaluation
from pipeline.records.run_folder import TASKS_FOLDER
from pipeline.run.context import RunContext
from pipeline.run.scoring import evaluation_path, held_out_keys, models_to_score, tasks_that_hold
from pipeline.run.tokenizers import begins_of

if TYPE_CHECKING:
    from pipeline.distributed.process_group import Ranks
    from pipeline.evaluation.task_list import TaskList
    from pipeline.evaluation.task_scores import Missing, TaskEvaluator


@dataclass(frozen=True)
class Asked:
    """What a user asks for.

    Attributes:
        names: of tasks, with commas between.
        few_shot: examples before each question; None leaves them to the tasks.
        tag: one checkpoint; None for the base model and the last of each stage.
    """

    names: str
    few_shot: int | None = None
    tag: str | None = None

    def __post_init__(self) -> None:
        """Check it.

        Raises:
            UserError: no task is named, or the number of examples is negative.
        """
        if not self.each:
            raise UserError(f'--tasks "{self.names}": names no task; give some, such as --tasks held_out')
        if self.few_shot is not None and self.few_shot < 0:
            raise UserError(f"--few-shot {self.few_shot}: give 0 or more")

    @property
    def each(self) -> list[str]:
        """The names."""
        return [name.strip() for name in self.names.split(",") if name.strip()]

    @property
    def words(self) -> list[str]:
        """As options of the command line."""
        few_shot = [] if self.few_shot is None else ["--few-shot", str(self.few_shot)]
        return ["--tasks", self.names, *few_shot, *(["--checkpoint", self.tag] if self.tag else [])]


class TaskScoring:
    """The tasks that a user asks for, on the models of a run.

    Args:
        context: the run.
        asked: which tasks, of which models.
        writes: whether this process writes the tasks of the run's held-out sets; else they are there.

    Raises:
        UserError: there is no such task or checkpoint, or a task's data is not at hand.
    """

    def __init__(self, context: RunContext, asked: Asked, *, writes: bool = True) -> None:
        self._context, self._asked = context, asked
        self._models = models_to_score(context, asked.tag)
        self._evaluator = _evaluator(context, load(context, asked, writes=writes))

    def missing(self) -> "Missing":
        """What has to be computed: all of it where the user forces it."""
        if self._context.redo:
            return {model.label: list(self._evaluator.tasks.tasks) for model in self._models}
        return self._evaluator.missing(self._models)

    def compute(self, ranks: "Ranks") -> None:
        """Score what is missing; all ranks take part."""
        text = {model.label: begins_of(self._context, model) for model in self._models}
        self._evaluator.score(self._models, self.missing(), text, ranks, self._context.dims)

    def write(self) -> Evaluation:
        """Put the scores into what the evaluation left, print the table, and note that it is done."""
        from pipeline.evaluation.task_table import task_table

        path, scores = evaluation_path(self._context, self._asked.tag), self._evaluator.result(self._models)
        evaluation = Evaluation.load(path)
        tasks = tasks_that_hold(self._context, evaluation.tasks, self._models, scores)
        evaluation = evaluation.model_copy(update={"tasks": tasks})
        evaluation.save(path)
        shown = evaluation.model_copy(update={"tasks": {name: tasks[name] for name in scores if name in tasks}})
        print(f"{task_table(shown)}\nwritten: {path}", flush=True)
        write_json(self._context.folder.tasks_done, {"tasks": self._asked.each, "few_shot": self._asked.few_shot})
        return evaluation


def load(context: RunContext, asked: Asked, *, writes: bool = True) -> "TaskList":
    """The tasks with their data; those of the run's held-out sets are written before.

    Raises:
        UserError: there is no such task, or a task's data is not at hand.
    """
    from pipeline.evaluation.held_out_tasks import GROUP, write_held_out_tasks
    from pipeline.evaluation.task_list import load_tasks

    folder = context.folder / TASKS_FOLDER
    is_held_out = any(name.startswith(GROUP) for name in asked.each)
    if is_held_out and writes:
        write_held_out_tasks(context.store, held_out_keys(context), folder)
    return load_tasks(asked.each, asked.few_shot, [folder] if is_held_out else [])


def fetch_tasks(context: RunContext, asked: Asked) -> None:
    """Download the data of tasks, so that no later step needs a network for it.

    Raises:
        UserError: there is no such task, or the hub does not give its data.
    """
    for name, task in load(context, asked).tasks.items():
        print(f"fetch: {name}: {len(task.eval_docs):,} documents", flush=True)


def score_tasks(context: RunContext, asked: Asked, ranks: "Ranks") -> None:
    """Score what is missing on all ranks, and write and print all that was asked for.

    Args:
        context: the run.
        asked: which tasks, of which models.
        ranks: those that compute.

    Raises:
        AgreedError: there is no such task or checkpoint, or a task's data is not at hand.
    """
    scoring, problem = None, ""
    if ranks.is_first:
        try:
            scoring = TaskScoring(context, asked)
        except UserError as error:
            problem = str(error)
    problem = ranks.agreed(problem)  # the others wait here for what the first one writes
    if problem:
        raise AgreedError(problem)
    scoring = scoring or TaskScoring(context, asked, writes=False)
    scoring.compute(ranks)
    if ranks.is_first:
        scoring.write()
    ranks.wait()


def _evaluator(context: RunContext, tasks: "TaskList") -> "TaskEvaluator":
    from pipeline.evaluation.task_scores import TaskEvaluator

    run = context.run
    return TaskEvaluator(tasks, run.evaluate.window, context.dense, context.dtype, run.cache_dir / "tasks")
