"""The phases of a preparation in their order, and what each does with a task."""

from collections.abc import Callable
from typing import Any

from data_prep.dedup import deduplicate as survivors
from data_prep.dedup.deduplicate import deduplicate
from data_prep.dedup.held_out import CopyIndex
from data_prep.executor.pool import Executor, Phase
from data_prep.phases import filter as filtering
from data_prep.phases import tokenize as tokenizing
from data_prep.phases.budgets import seeded_slices, source_cap, total_of
from data_prep.phases.caps import is_reached
from data_prep.phases.filter import filter_slice, held_out_runs
from data_prep.phases.replay import measure, quotas
from data_prep.phases.tokenize import tokenize_slice
from data_prep.phases.write_store import finish
from data_prep.plan import Json, Work
from data_prep.reading.file_splits import FileToIndex, index_file


def index_source(_work: Work, task: int, files: list[dict[str, Any]]) -> Json:
    """Hash and cut one file."""
    return index_file(FileToIndex(**files[task]))


def index_copies(work: Work, _task: int) -> Json:
    """Gather the held-out texts that training documents are compared with."""
    return {"texts": CopyIndex.write(work.folder / "copies", list(held_out_runs(work)))}


PHASES: dict[str, Callable[..., Json]] = {
    "index": index_source,
    "filter": filter_slice,
    "copies": index_copies,
    "join": survivors.join,
    "star": survivors.star,
    "survivors": survivors.survivors,
    "measure": measure,
    "quotas": quotas,
    "tokenize": tokenize_slice,
    "finish": finish,
}


def run_phases(work: Work, executor: Executor) -> None:
    """Everything from the plan to the store, as far as it is not done."""
    plan = work.plan
    weights = {part.number: part.size for part in plan.slices}
    slices = _longest_first(list(weights), weights)
    if plan.filters_first:
        executor.run(Phase(work, filtering.PHASE, slices, weights=weights, label="filter"))
        if plan.finds_copies:
            executor.run(Phase(work, "copies", [0], label="index held-out text"))
        if plan.data.filters.duplicates:
            deduplicate(work, executor)
        if plan.replay:
            replayed = [part.number for name in plan.replay for part in plan.slices_of(name)]
            executor.run(Phase(work, "measure", replayed, label="measure replay"))
            executor.run(Phase(work, "quotas", [0], label="share replay"))
    executor.run(_tokenize(work, weights))
    executor.run(Phase(work, "finish", [0], label="write manifest"))


def _longest_first(tasks: list[int], weights: dict[int, int]) -> list[int]:
    """So that the last ones to be done are short, and no worker waits long for another."""
    return sorted(tasks, key=lambda task: (-weights[task], task))


def _tokenize(work: Work, weights: dict[int, int]) -> Phase:
    """Slices of a capped source come in the order in which they are taken, and no more of them than are needed."""
    plan = work.plan
    orders = {
        (name, source): seeded_slices(plan, name, source)
        for name, entry in plan.data.sets.items()
        for source in range(len(entry.source_list))
    }
    totals: dict[int, dict[str, int]] = {}

    def wanted(number: int) -> bool:
        part = plan.slices[number]
        cap, order = source_cap(plan, part.name, part.source), orders[part.name, part.source]
        for other in order if cap.limits else ():
            if other not in totals and work.marker(tokenizing.PHASE, other).is_file():
                totals[other] = total_of(work, other)
        return not is_reached(order, totals, cap)

    capped = [number for key, order in orders.items() for number in order if source_cap(plan, *key).limits]
    rest = [number for order in orders.values() for number in order]
    tasks = list(dict.fromkeys([*capped, *_longest_first(rest, weights)]))
    return Phase(work, tokenizing.PHASE, tasks, weights=weights, label="tokenize", wanted=wanted)
