"""Runs the tasks of a phase, handed out one by one: on local processes, MPI ranks or SLURM's tasks.

A task writes its results under their names whole, and then its marker with its figures; a task whose marker is there
is not done again. What a task writes depends on the plan alone, so that it makes no difference who does it, in which
order, or whether it was begun before. The three ways differ in who waits for whom, and in nothing else.
"""

import errno
import os
import resource
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures import Executor as Pool
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from common.errors import OwnError, UserError
from common.files import write_json
from common.progress import progress
from data_prep.plan import Json
from data_prep.work import Work, check_disk

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@dataclass(frozen=True)
class Phase:
    """Tasks of one kind.

    Attributes:
        work: the folder they work in.
        name: of the folder of their markers.
        function: what does a task, given the work, the task's number and the arguments; its return value is kept with
            the marker. A worker is told its name, so it stands at the top of a module.
        tasks: their numbers, in the order in which they are handed out.
        arguments: of the function, besides the work and the task.
        label: what the progress bar says.
        weights: the bytes of input of each task, for the progress bar.
        wanted: says whether a task is still needed when its turn comes.
        markers: where the markers are, if not in the work folder.
    """

    work: Work
    name: str
    function: Callable[..., Json]
    tasks: list[int]
    arguments: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    weights: dict[int, int] = field(default_factory=dict)
    wanted: Callable[[int], bool] | None = None
    markers: dict[int, Path] = field(default_factory=dict)

    def marker(self, task: int) -> Path:
        """The file that says that a task is done."""
        return self.markers.get(task) or self.work.marker(self.name, task)

    def is_done(self, task: int) -> bool:
        """Whether it is, or need not be."""
        return self.marker(task).is_file() or (self.wanted is not None and not self.wanted(task))

    def call(self, task: int) -> "Call":
        """What a worker needs to do a task."""
        return Call(self.work, self.function, self.arguments, task, self.marker(task))


class Call(NamedTuple):
    """One task, for any process."""

    work: Work
    function: Callable[..., Json]
    arguments: dict[str, Any]
    task: int
    marker: Path


class Executor(Protocol):
    """What runs a phase."""

    @property
    def is_alone(self) -> bool:
        """Whether no other job works on the same phases."""

    def run(self, phase: Phase) -> None:
        """Return when every task of the phase is done.

        Raises:
            UserError: a task met a mistake, or a worker died.
        """


class Done(NamedTuple):
    """A finished task, and the most memory that its process has held so far, in bytes."""

    task: int
    peak_memory: int


def do_task(call: Call) -> Done:
    """Do one task and write its marker, in whichever process.

    Raises:
        UserError: a mistake in the input or the settings, or no room on the disk.
    """
    try:
        write_json(call.marker, call.function(call.work, call.task, **call.arguments))
    except OSError as error:
        if error.errno in NO_ROOM:
            raise check_disk(error) from error
        raise
    return Done(call.task, peak_memory())


def peak_memory() -> int:
    """The most memory that this process has held, mapped files included, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass
class PoolExecutor:
    """Runs tasks on a pool of workers, or in this process where there is none; keeps each worker one task ahead.

    `claims`, where several such executors share a phase, says which tasks are this one's, as they come.
    """

    pool: Pool | None = None
    num_workers: int = 1
    claim: Callable[[Phase], Iterator[int]] | None = None
    show: bool = True
    tasks_done: int = 0
    peak_memory: int = 0  # of any process, in bytes

    @property
    def is_alone(self) -> bool:
        """Whether no other job works on the same phases."""
        return self.claim is None

    def run(self, phase: Phase) -> None:
        """Run what is not done yet.

        Raises:
            OwnError: a mistake in a task, where other jobs do the others.
        """
        try:
            self._run(phase)
        except UserError as error:
            if self.is_alone:
                raise
            raise OwnError(*error.args) from error

    def _run(self, phase: Phase) -> None:
        done = [task for task in phase.tasks if phase.marker(task).is_file()]
        total = sum(_weight(phase, task) for task in phase.tasks)
        unit = "byte" if phase.weights else "task"
        before = sum(_weight(phase, task) for task in done)
        show = self.show and len(done) < len(phase.tasks)
        with progress(total, phase.label or phase.name, unit, show=show, initial=before) as bar:
            tasks = self.claim(phase) if self.claim else (t for t in phase.tasks if not phase.is_done(t))
            for done_now in self._results(phase, tasks):
                bar.update(_weight(phase, done_now.task))
                self.tasks_done += 1
                self.peak_memory = max(self.peak_memory, done_now.peak_memory, peak_memory())

    def _results(self, phase: Phase, tasks: Iterable[int]) -> Iterator[Done]:
        if self.pool is None:
            for task in tasks:
                yield do_task(phase.call(task))
            return
        running: set[Future[Done]] = set()
        ahead = self.num_workers if self.claim else 2 * self.num_workers
        try:
            for task in tasks:
                with _interrupts_later():  # the pool starts workers as tasks come
                    running.add(self.pool.submit(do_task, phase.call(task)))
                if len(running) >= ahead:
                    finished, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in finished)
            while running:
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in finished)
        except BrokenProcessPool as error:
            raise UserError(
                f"{phase.label or phase.name}: a worker process died, perhaps for lack of memory; "
                "the same command resumes there, --workers 1 needs least"
            ) from error
        finally:
            for future in running:
                future.cancel()


@contextmanager
def _interrupts_later() -> Iterator[None]:
    """Hold Ctrl-C back until the block is through; processes started in it never see it: this one ends them."""
    held_back: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: held_back.append(number))  # other threads may get it
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a process inherits this from its parent
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, before)
    if held_back:
        signal.raise_signal(signal.SIGINT)


def _weight(phase: Phase, task: int) -> int:
    return phase.weights.get(task, 1)


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
