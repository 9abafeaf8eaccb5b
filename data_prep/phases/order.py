"""The phases of a preparation in their order."""

from data_prep.dedup.deduplicate import deduplicate
from data_prep.executor.pool import Executor, Phase
from data_prep.phases.budgets import is_reached, seeded_slices, source_budget, total_of
from data_prep.phases.copies import COUNT, INDEX, count_copies, index_copies, kept_shards
from data_prep.phases.filter import filter_slice
from data_prep.phases.replay import measure, quotas, replayed_sets
from data_prep.phases.tokenize import tokenize_slice
from data_prep.phases.write_set import publish, write_set
from data_prep.plan import FILTER, TOKENIZE
from data_prep.work import Work


def run_phases(work: Work, executor: Executor) -> None:
    """Everything from the plan to the finished sets, as far as it is not done."""
    plan = work.plan
    weights = {part.number: part.size for part in plan.slices}
    filtered = [part.number for part in plan.slices if plan.is_filtered_first(plan.set_of(part))]
    filtered = _longest_first(filtered, weights)
    executor.run(Phase(work, FILTER, filter_slice, filtered, label="filter", weights=weights))
    if plan.finds_copies:
        executor.run(Phase(work, INDEX, index_copies, [0], label="index held-out text"))
    if plan.finds_duplicates:
        deduplicate(work, executor)
    replayed = [part.number for number in replayed_sets(work) for part in plan.slices_of(number)]
    if replayed:
        executor.run(Phase(work, "measure", measure, replayed, label="measure replay"))
        executor.run(Phase(work, "quotas", quotas, [0], label="share replay"))
    executor.run(_tokenize(work, weights))
    if plan.kept:
        executor.run(Phase(work, COUNT, count_copies, list(range(len(kept_shards(work)))), label="count copies"))
    written = [number for number, one in enumerate(plan.sets) if one.is_written]
    executor.run(Phase(work, "write", write_set, written, label="write sets"))
    executor.run(Phase(work, "publish", publish, [0], label="publish sets"))


def _longest_first(tasks: list[int], weights: dict[int, int]) -> list[int]:
    """So that the last ones to be done are short, and no worker waits long for another."""
    return sorted(tasks, key=lambda task: (-weights[task], task))


def _tokenize(work: Work, weights: dict[int, int]) -> Phase:
    """Slices of a source with a budget come in the order they are taken in, and no more of them than are needed."""
    plan = work.plan
    orders = {
        (number, source): seeded_slices(plan, number, source)
        for number, one in enumerate(plan.sets)
        if one.is_written and one.group != "benchmark"
        for source in range(len(one.entry.source_list))
    }
    totals: dict[int, dict[str, int]] = {}

    def wanted(number: int) -> bool:
        part = plan.slices[number]
        budget, order = source_budget(plan, part.set, part.source), orders[part.set, part.source]
        for other in order if budget.limits else ():
            if other not in totals and work.marker(TOKENIZE, other).is_file():
                totals[other] = total_of(work, other)
        return not is_reached(order, totals, budget)

    limited = [number for key, order in orders.items() for number in order if source_budget(plan, *key).limits]
    rest = [number for order in orders.values() for number in order]
    tasks = list(dict.fromkeys([*limited, *_longest_first(rest, weights)]))
    return Phase(work, TOKENIZE, tokenize_slice, tasks, label="tokenize", weights=weights, wanted=wanted)
