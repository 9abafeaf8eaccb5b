"""The result in words and numbers: the headline's sentence and tiles, and the tables."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pipeline.records.evaluation import BASE, GROUPS, Change, Evaluation, Group, SetResult
from pipeline.report.data import RunData, Stage, stage_label

NOT_EVALUATED = "This run has not been evaluated yet: evaluation.json is not in its folder."
_TITLES = {"new": "New languages", "old": "Old languages", "watch": "Watched, never trained on"}


@dataclass(frozen=True)
class Tile:
    """One big number of the headline; ``tone`` is good, bad or empty."""

    title: str
    value: str
    note: str
    tone: str = ""


@dataclass(frozen=True)
class Cell:
    """Bits per character of one checkpoint, and its change against the base model's."""

    value: str
    change: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Row:
    """One set of the results table."""

    name: str
    language: str
    documents: str
    characters: str
    cells: list[Cell]


@dataclass(frozen=True)
class Results:
    """The results table: the checkpoints' titles, and each group's rows."""

    titles: list[str]
    groups: list[tuple[Group, str, list[Row]]]


def sentence(data: RunData) -> str:
    """The run's result in one sentence."""
    evaluation = data.evaluation
    if evaluation is None:
        return NOT_EVALUATED
    last = evaluation.checkpoints[-1]
    if last == BASE:
        return "Only the base model has been scored so far."
    parts = []
    for noun in ("new", "old"):
        changes = {name: r.change[last] for name, r in evaluation.sets.items() if r.group == noun and last in r.change}
        if changes:
            parts.append(_clause(noun, changes))
    return f"After {stage_label(last)}, on held-out text, " + ", and ".join(parts) + "." if parts else NOT_EVALUATED


def _clause(noun: str, changes: dict[str, Change]) -> str:
    mean = mean_percent(changes.values())
    amount = f"{abs(mean):.1f} % {'fewer' if mean <= 0 else 'more'} bits per character"
    if len(changes) == 1:
        return f"the {noun} language {next(iter(changes))} takes {amount}"
    each = ", ".join(f"{name}\N{NO-BREAK SPACE}{signed(change.percent)}" for name, change in changes.items())
    return f"the {noun} languages take {amount} ({each})"


def warnings(data: RunData) -> list[str]:
    """What steps have warned of, and what was forgotten."""
    lines = [line for manifest in data.manifests for line in manifest.figures.get("warnings", [])]
    for checkpoint in data.evaluation.checkpoints if data.evaluation else []:
        worse = data.evaluation.forgotten(checkpoint) if data.evaluation else {}
        if worse:
            sets = ", ".join(f"{name} {signed(change.percent)}" for name, change in worse.items())
            lines.append(f"{stage_label(checkpoint)} is worse than the base model on languages that it knew: {sets}")
    return lines


def slowest_ranks(stage: Stage) -> list[str]:
    """A sentence on the ranks that others waited for most often, at most three of them; none where no rank was."""
    behind: dict[str, list[float]] = {}
    for row in stage.rows:
        if row.slowest_rank is not None:
            behind.setdefault(row.slowest_rank.name, []).append(row.slowest_rank.percent)
    if not behind:
        return []
    most = sorted(behind.items(), key=lambda entry: -len(entry[1]))[:3]
    each = ", ".join(
        f"{name} in {len(percents):,} of {len(stage.rows):,} steps (median {statistics.median(percents):+.0f} %)"
        for name, percents in most
    )
    return [f"The slowest rank, where it worked at least 10 % longer than the median of the others: {each}."]


def tiles(data: RunData) -> list[Tile]:
    """The headline's numbers; what is not known yet is left out."""
    result = []
    evaluation = data.evaluation
    last = evaluation.checkpoints[-1] if evaluation else BASE
    for group, title in (("new", "New languages"), ("old", "Old languages")):
        sets = [r for r in evaluation.sets.values() if r.group == group and last in r.change] if evaluation else []
        if sets:
            changes = [r.change[last] for r in sets]
            mean = mean_percent(changes)
            mean_tone = "good" if mean < 0 else "bad"
            note = f"bits per character against base, {_count(len(sets), 'set')}; lower is better"
            result.append(Tile(title, signed(mean), note, mean_tone if mean_tone in map(tone, changes) else ""))
    parameters = evaluation.parameters if evaluation else {}
    if {"dense", "total", "active"} <= parameters.keys():
        dense, total, active = (short(parameters[key]) for key in ("dense", "total", "active"))
        result.append(Tile("Parameters", total, f"{active} active for one token; the dense model has {dense}"))
    seconds = sum(float(m.figures.get("seconds") or 0) for m in data.manifests if m.step in data.stages)
    tokens = sum(stage.tokens for stage in data.stages.values())
    if tokens:
        value = duration(seconds) if seconds else short(tokens) + " tokens"
        note = " + ".join(f"{short(s.tokens)} tokens in {s.label}" for s in data.stages.values() if s.tokens)
        result.append(Tile("Training", value, note))
    return result


def results(evaluation: Evaluation) -> Results:
    """Bits per character of every set and checkpoint."""
    groups = []
    for group in GROUPS:
        rows = [_row(name, r, evaluation.checkpoints) for name, r in evaluation.sets.items() if r.group == group]
        if rows:
            groups.append((group, _TITLES[group], rows))
    return Results([stage_label(name) for name in evaluation.checkpoints], groups)


def _row(name: str, result: SetResult, checkpoints: list[str]) -> Row:
    cells = []
    for checkpoint in checkpoints:
        value, change = result.bits_per_character.get(checkpoint), result.change.get(checkpoint)
        text = "–" if value is None else f"{value:.3f}"
        cells.append(Cell(text, with_interval(change), tone(change)) if change else Cell(text))
    return Row(name, result.language, f"{result.documents:,}", f"{result.characters:,}", cells)


def with_interval(change: Change) -> str:
    """A change with its 95 % interval, as -43.9 % ± 1.1."""
    return signed(change.percent) + (f" ± {change.interval:.1f}" if change.interval is not None else "")


def tone(change: Change) -> str:
    """Good or bad where the change is beyond its interval; empty where it is not, or none is known."""
    if change.interval is None or abs(change.percent) <= change.interval:
        return ""
    return "good" if change.percent < 0 else "bad"


def mean_percent(changes: Iterable[Change]) -> float:
    """The mean change, each set alike."""
    percents = [change.percent for change in changes]
    return sum(percents) / len(percents)


def steps_table(data: RunData) -> list[tuple[str, str, str, str, str]]:
    """(step, time, tokens/s, peak memory, note) of each finished step."""
    return [
        (
            m.step,
            duration(float(m.figures["seconds"])) if _is_number(m.figures.get("seconds")) else "–",
            f"{m.figures['tokens_per_second']:,.0f}" if _is_number(m.figures.get("tokens_per_second")) else "–",
            f"{m.figures['peak_memory_gb']:.2f} GB" if _is_number(m.figures.get("peak_memory_gb")) else "–",
            str(m.figures.get("note", "")),
        )
        for m in data.manifests
    ]


def versions(data: RunData) -> dict[str, str]:
    """Every package's version; where steps ran with different ones, all of them."""
    found: dict[str, list[str]] = {}
    for manifest in data.manifests:
        for package, version in manifest.versions.items():
            if version not in found.setdefault(package, []):
                found[package].append(version)
    return {package: ", then ".join(found[package]) for package in sorted(found)}


def signed(percent: float) -> str:
    """A change in percent with its sign."""
    return f"{percent:+.1f}\N{NO-BREAK SPACE}%".replace("-", "−")


def short(number: float) -> str:
    """A large number as people say it: 134.5 M."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.1f}\N{NO-BREAK SPACE}{suffix}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """12.3 s, 8 min 20 s, 3 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _count(number: int, noun: str) -> str:
    return f"mean of {number} {noun}s" if number > 1 else f"1 {noun}"
