"""lm-eval's tasks by the names that users give: its own, those of this program, and those of users' folders."""

import difflib
import inspect
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import UserError, one_line
from common.files import content_key
from pipeline.config.run import PROGRAM

OWN = PROGRAM / "launch" / "tasks"
SEED = 1234  # lm-eval's, of the choice of examples
WHERE = ("metadata", "dataset_path", "dataset_name", "dataset_kwargs", "custom_dataset")  # not what is asked


@dataclass(frozen=True)
class TaskList:
    """Tasks that are loaded, with their data.

    Attributes:
        tasks: lm-eval's, by name.
        groups: lm-eval's, by name; those that have figures of their own.
        contents: by task, a hash of its questions and of how they are asked.
    """

    tasks: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)
    contents: dict[str, str] = field(default_factory=dict)

    def part_of(self, name: str) -> str:
        """The outermost group whose figures sum a task or group up; empty where there is none."""
        holders = [
            group
            for group, found in self.groups.items()
            if name in [one.name for one in found.get_all_groups()] + [one.task_name for one in found.get_all_tasks()]
        ]
        return max(holders, key=lambda group: len(self.groups[group].get_all_tasks()), default="")


def load_tasks(names: Sequence[str], few_shot: int | None, folders: Sequence[Path] = ()) -> TaskList:
    """Find tasks, and load their data.

    Args:
        names: of tasks or groups; a folder stands for all tasks in it, a YAML file for its own.
        few_shot: examples before each question; None leaves them to the tasks. A task that says 0 keeps it.
        folders: where tasks are looked for, besides lm-eval's own and those that come with this program.

    Raises:
        UserError: there is no such task, or its data is not at hand.
    """
    _be_quiet()
    from lm_eval.tasks import TaskManager

    paths = [Path(name) for name in names if _is_path(name)]
    own = [path if path.is_dir() else path.parent for path in paths]
    known = [OWN, *folders, *own]
    manager = TaskManager(include_path=known, include_defaults=False)
    wanted = [found for name in names for found in (_names_in(name) if _is_path(name) else [name])]
    if not _knows_all(manager, wanted):
        manager = TaskManager(include_path=known)
    _check_names(manager, wanted)
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    for name in wanted:
        if name not in tasks and name not in groups:  # as a group of before asks it
            loaded = _load(manager, name)
            tasks |= {task: one for task, one in loaded["tasks"].items() if task not in tasks}
            groups |= {group: one for group, one in loaded["groups"].items() if group not in groups}
    groups = {name: one for name, one in groups.items() if one.has_aggregation}
    for name, task in tasks.items():
        _check_kind(name, task)
        _set_few_shot(task, few_shot)
        _check_few_shot(name, task)
    return TaskList(tasks, groups, {name: _content(task) for name, task in tasks.items()})


def _be_quiet() -> None:
    """lm-eval and the hub's clients speak of what is not the user's concern, in lines and in bars."""
    for name in ("lm_eval", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import datasets

    datasets.disable_progress_bars()


def _is_path(name: str) -> bool:
    return Path(name).is_dir() or Path(name).suffix in (".yaml", ".yml")


def _names_in(name: str) -> list[str]:
    """All groups and tasks of a folder, or those of a file; groups first, which may say how their tasks are asked.

    Raises:
        UserError: there are none.
    """
    from lm_eval.tasks import TaskManager

    path = Path(name)
    folder = path if path.is_dir() else path.parent
    index = TaskManager(include_path=folder, include_defaults=False).task_index if folder.is_dir() else {}
    files = {found: Path(entry.yaml_path).resolve() for found, entry in index.items() if entry.yaml_path}
    found = [name for name, file in files.items() if path.is_dir() or file == path.resolve()]
    if not found:
        raise UserError(f"--tasks {name}: holds no task of lm-eval's; give it a YAML file with a task: in it")
    return sorted(found, key=lambda name: index[name].kind.name != "GROUP")


def _knows_all(manager: Any, names: Sequence[str]) -> bool:
    """Whether an index knows these names, and all that groups among them consist of."""
    waiting, seen = list(names), set(names)
    while waiting:
        entry = manager.task_index.get(waiting.pop())
        if entry is None:
            return False
        new = set(_members(entry)) - seen
        seen |= new
        waiting += new
    return True


def _members(entry: Any) -> Iterator[str]:
    """The names of what a group or a tag consists of."""
    from lm_eval.tasks._yaml_loader import load_yaml

    yield from entry.tags
    if entry.kind.name == "GROUP" and entry.yaml_path:
        for member in load_yaml(entry.yaml_path, resolve_func=False).get("task", []):
            yield member if isinstance(member, str) else member.get("task") or member.get("group")


def _check_names(manager: Any, names: Sequence[str]) -> None:
    for name in names:
        if name not in manager.task_index:
            close = difflib.get_close_matches(name, manager.all_tasks, 3)
            hint = f"did you mean {' or '.join(close)}?" if close else "name one, or a folder with YAML files of tasks"
            raise UserError(f"--tasks {name}: no task of this name in lm-eval or launch/tasks; {hint}")


def _load(manager: Any, name: str) -> Any:
    """One task or group with its data.

    Raises:
        UserError: its data is not at hand, or its file is not right.
    """
    from datasets.exceptions import DatasetNotFoundError

    try:
        return manager.load([name])
    except (ConnectionError, DatasetNotFoundError) as error:
        raise UserError(
            f"--tasks {name}: its data is not here ({one_line(error)}); where there is a network, do once: "
            f"python -m pipeline fetch RUN.yaml --tasks {name}"
        ) from error
    except Exception as error:  # noqa: BLE001 - a task's file names what it likes, functions too
        raise UserError(f"--tasks {name}: can't be loaded ({type(error).__name__}: {one_line(error)})") from error


def _check_kind(name: str, task: Any) -> None:
    """Refuse what can't be asked here."""
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(f"--tasks {name}: runs programs that the model writes, which is not done here; leave it out")
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"--tasks {name}: asks about pictures or sound, which these models don't take; leave it out")


def _set_few_shot(task: Any, few_shot: int | None) -> None:
    """As lm-eval's own command does."""
    told = task.get_config("num_fewshot")
    if few_shot is not None and told != 0:
        task.set_config("num_fewshot", few_shot)
    elif told is None:
        task.set_config("num_fewshot", 0)


def _check_few_shot(name: str, task: Any) -> None:
    """Refuse more examples than there are documents to take them from."""
    shots = task.get_config("num_fewshot")
    if not shots:
        return
    split = getattr(getattr(task, "fewshot_cfg", None), "split", None)
    own = int(split is not None and split == task.get_config("test_split"))  # a question is no example of itself
    found = len(list(task.fewshot_docs() or [])) - own
    if shots > found:
        raise UserError(
            f"--tasks {name}: {shots} examples, but it has {found} to take them from; give less: --few-shot"
        )


def _content(task: Any) -> str:
    """A hash of a task's documents, and of all that its file says of how they are asked and judged."""
    config = {key: value for key, value in task.dump_config().items() if key not in WHERE}
    documents = [_hash_of(task.eval_docs)]
    if config["num_fewshot"]:
        documents.append(_hash_of(task.fewshot_docs() or []))
    text = json.dumps([str(task.VERSION), config, documents], sort_keys=True, default=_source)
    return content_key(re.sub(r" at 0x[0-9a-f]+", "", text))


def _hash_of(documents: Any) -> str:
    return content_key([json.dumps(document, sort_keys=True, default=str) for document in documents])


def _source(value: Any) -> str:
    """What stands for a function in a hash."""
    try:
        return inspect.getsource(value)
    except (TypeError, OSError):
        return str(value)
