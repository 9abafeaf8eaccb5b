"""The folder that a plan is worked out in: where tasks find the plan and keep their results and markers."""

from collections.abc import Callable, Hashable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeVar

from common.errors import UserError
from common.files import read_json
from data_prep.manifest import MANIFEST
from data_prep.plan import Json, KeptSet, Plan

T = TypeVar("T")


class Work:
    """The folder that a plan is worked out in, and what a process keeps of it: one object per process and folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._kept: dict[Hashable, Any] = {}

    def __reduce__(self) -> tuple[Callable[[Path], "Work"], tuple[Path]]:
        return _work_in, (self.folder,)

    @cached_property
    def plan(self) -> Plan:
        """The plan, read once."""
        return Plan.load(self.folder / "plan.json")

    @property
    def own_tokenizer(self) -> Path:
        """The folder of the model's own tokenizer, where the plan's extends it."""
        return self.folder / "own"

    def once(self, name: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives; made the first time that this name is asked for."""
        if name not in self._kept:
            self._kept[name] = make()
        found: T = self._kept[name]
        return found

    @property
    def tokens(self) -> Path:
        """The folder of finished sets."""
        return self.folder.parent

    @property
    def is_finished(self) -> bool:
        """Whether all that the plan prepares is there: another job that shares the work has finished it."""
        plan: Plan | None = self.__dict__.get("plan")
        if plan is None:
            return False
        written = [self.tokens / one.key / MANIFEST for one in plan.sets if one.is_written]
        return all(path.is_file() for path in [*written, *(self.record(kept) for kept in plan.kept)])

    def record(self, kept: KeptSet) -> Path:
        """The file that keeps the count of a kept set's copies."""
        return copies_record(self.tokens, kept.record)

    def marker(self, phase: str, task: int) -> Path:
        """The file that says that a task is done, with its figures."""
        return self.folder / "done" / phase / f"{task:06d}.json"

    def figures(self, phase: str, task: int) -> Json:
        """What a finished task found."""
        found: Json = read_json(self.marker(phase, task))
        return found

    def path(self, phase: str, task: int, suffix: str) -> Path:
        """Where a task keeps a result."""
        return self.folder / phase / f"{task:06d}{suffix}"


@lru_cache(maxsize=2)
def _work_in(folder: Path) -> Work:
    """The one object of a worker process, which lives no longer than one preparation."""
    return Work(folder)


def copies_record(tokens: Path, name: str) -> Path:
    """The file that keeps a count of copies, in the folder of finished sets."""
    return tokens / ".copies" / f"{name}.json"


def check_disk(error: OSError) -> UserError:
    """The line for a write that failed."""
    return UserError(f"{error.filename or 'disk'}: can't be written ({error.strerror}); make room and run it again")
