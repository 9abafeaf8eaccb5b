"""Puts a comparison together: each run's figures, groups of seeds, and intervals against one of the runs."""

import re
import statistics
from collections.abc import Sequence

import numpy as np

from pipeline.comparison.read import ReadRun, labels_of
from pipeline.evaluation.evaluate import paired_change
from pipeline.evaluation.task_table import examples, shown_tasks
from pipeline.records.comparison import ComparedGroup, ComparedRun, Comparison, Spread
from pipeline.records.evaluation import Change, Group
from pipeline.records.task_score import Figure
from pipeline.report.summary import mean_percent


def compare(runs: Sequence[ReadRun], against: ReadRun | None = None) -> Comparison:
    """All that ``compare.json`` holds.

    Args:
        runs: in the order in which they are shown.
        against: the run among them that the others are paired with.
    """
    labels = labels_of(runs)
    members: dict[str, list[int]] = {}
    for index, one in enumerate(runs):
        members.setdefault(one.difference, []).append(index)
    groups = [[runs[index] for index in found] for found in members.values()]
    names = _group_names(groups, [labels[found[0]] for found in members.values()])
    compared = [
        [_compared(runs[index], labels[index], name) for index in found]
        for name, found in zip(names, members.values(), strict=True)
    ]
    paired, notes = _paired(runs, labels, against) if against is not None else ({}, [])
    return Comparison(
        runs=[one for found in compared for one in found],
        groups=[_group(found) for found in compared],
        against=labels[list(runs).index(against)] if against is not None else None,
        paired=paired,
        notes=[*_documents_differ(runs), *notes, *_unknown(runs, [one for found in compared for one in found])],
    )


def _compared(read: ReadRun, label: str, group: str) -> ComparedRun:
    def changes(kind: Group) -> dict[str, Change]:
        sets = read.evaluation.sets.items()
        return {name: r.change[read.checkpoint] for name, r in sets if r.group == kind and read.checkpoint in r.change}

    new, old = changes("new"), changes("old")
    return ComparedRun(
        name=label,
        folder=str(read.folder.path),
        seed=read.run.seed,
        group=group,
        checkpoint=read.checkpoint,
        new=new,
        old=old,
        watch=changes("watch"),
        means={kind: mean_percent(found.values()) for kind, found in (("new", new), ("old", old)) if found},
        parameters=read.evaluation.parameters,
        tokens=read.tokens,
        flops=read.flops(),
        seconds=read.seconds,
        tasks=_tasks(read),
    )


def _tasks(read: ReadRun) -> dict[str, Figure]:
    """The first metric of each task; those that were asked otherwise have another name."""
    scores = {name: found.get(read.checkpoint) for name, found in shown_tasks(read.evaluation.tasks).items()}
    return {
        f"{name} {metric}, {examples(score)}-shot": figure
        for name, score in scores.items()
        if score is not None
        for metric, figure in list(score.metrics.items())[:1]
    }


def _group(runs: list[ComparedRun]) -> ComparedGroup:
    seconds = [one.seconds for one in runs if one.seconds is not None]
    # A watched set is the group's where all of its runs have it.
    sets = [name for name in runs[0].changes if all(name in one.changes for one in runs)]
    return ComparedGroup(
        name=runs[0].group,
        runs=[one.name for one in runs],
        means={kind: spread([one.means[kind] for one in runs]) for kind in runs[0].means},
        changes={name: spread([one.changes[name].percent for one in runs]) for name in sets},
        seconds=spread(seconds) if len(seconds) == len(runs) else None,
    )


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation."""
    return Spread(mean=statistics.fmean(values), deviation=statistics.stdev(values) if len(values) > 1 else None)


def _group_names(groups: list[list[ReadRun]], firsts: list[str]) -> list[str]:
    """What the runs of each group are called together: their name without the seed, where that is one name.

    Args:
        groups: runs that differ by seed alone.
        firsts: the label of each group's first run, no two the same.
    """
    names = []
    for runs, first in zip(groups, firsts, strict=True):
        stems = {re.sub(rf"[-_.]?(seed|s)?[-_.]?{one.run.seed}$", "", one.run.name) for one in runs}
        names.append(stems.pop() if len(runs) > 1 and len(stems) == 1 and "" not in stems else first)
    return [name if names.count(name) == 1 else first for name, first in zip(names, firsts, strict=True)]


def _paired(
    runs: Sequence[ReadRun], labels: list[str], against: ReadRun
) -> tuple[dict[str, dict[str, Change]], list[str]]:
    """By run and set, the change against a run over the same documents; and a line for each run that has none."""
    paired: dict[str, dict[str, Change]] = {}
    notes = []
    name_of_it = labels[list(runs).index(against)]
    for one, label in zip(runs, labels, strict=True):
        if one is against:
            continue
        if one.scored["window"] != against.scored["window"]:
            notes.append(
                f"{label} is scored in other windows than {name_of_it} (evaluate.window), so it has no intervals"
            )
            continue
        same = [name for name in one.evaluation.sets if _same_documents(one, against, name)]
        paired[label] = {name: paired_change(_bits(against, name), _bits(one, name)) for name in same}
        others = [name for name in one.evaluation.sets if name in against.evaluation.sets and name not in same]
        if others:
            notes.append(f"{label} has no interval on {', '.join(others)}: {name_of_it} scored other documents there")
    return paired, notes


def _same_documents(one: ReadRun, other: ReadRun, name: str) -> bool:
    """Whether both scored the same tokens of a set, in the same order."""
    documents = one.scored["sets"].get(name)
    return (
        documents is not None
        and documents == other.scored["sets"].get(name)
        and name in other.evaluation.sets
        and len(_bits(one, name)) == len(_bits(other, name)) > 0
    )


def _bits(read: ReadRun, name: str) -> np.ndarray:
    """Bits of each document of a set, [documents]."""
    return np.array(read.evaluation.sets[name].bits_by_document.get(read.checkpoint, []))


def _documents_differ(runs: Sequence[ReadRun]) -> list[str]:
    """A line where a set's held-out documents are not the same in all runs: their seed or text differs."""
    names = list(dict.fromkeys(name for one in runs for name in one.evaluation.sets))
    found = [
        name for name in names if len({one.scored["sets"][name] for one in runs if name in one.scored["sets"]}) > 1
    ]
    if not found:
        return []
    return [
        f"Not all runs scored the same documents of {', '.join(found)}: their text or data.seed differs, so "
        "differences between runs are partly those of documents"
    ]


def _unknown(runs: Sequence[ReadRun], compared: list[ComparedRun]) -> list[str]:
    """A line on runs whose operations can't be counted."""
    names = [one.name for one in compared if one.flops is None]
    if not names:
        return []
    return [f"FLOPs are unknown of {', '.join(names)}: the dense model's config or a stage's manifest is not there"]
