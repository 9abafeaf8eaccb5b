"""A comparison as rows of cells: what the page and the text on the screen show."""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from common.text_table import aligned
from pipeline.evaluation.task_table import with_error
from pipeline.records.comparison import ComparedGroup, ComparedRun, Comparison, Spread
from pipeline.records.evaluation import Change
from pipeline.report.summary import duration, short, tone

MISSING = "–"
SETS = (("new", "NEW"), ("old", "OLD"), ("watch", "WATCH"))
TITLES = {
    "changes": "Change of bits per character against the base model, in percent: lower is better",
    "cost": "Parameters, tokens and work of training",
    "tasks": "Tasks of lm-eval; ± is one standard error, or of several seeds their standard deviation",
}


@dataclass(frozen=True)
class Cell:
    """A figure; ``tone`` is good, bad or empty."""

    text: str
    tone: str = ""


@dataclass(frozen=True)
class Row:
    """A run, or a group of them. ``depth`` is 1 for a run of a group of several."""

    name: str
    cells: list[Cell]
    depth: int = 0


@dataclass(frozen=True)
class Table:
    """A heading for each column of figures, and the rows; ``key`` names the table on the page."""

    key: str
    title: str
    columns: list[str]
    rows: list[Row]

    @property
    def text(self) -> str:
        """The table as text."""
        lines = [["", *self.columns]]
        lines += [["  " * row.depth + row.name, *(_plain(cell.text) for cell in row.cells)] for row in self.rows]
        return f"{self.title.replace('±', '+-')}\n{aligned(lines, numbers_from=1)}"


def _plain(text: str) -> str:
    """A cell in the characters that every terminal has."""
    for sign, plain in (("\N{NO-BREAK SPACE}", " "), ("−", "-"), ("± ", "+-"), (MISSING, "-")):
        text = text.replace(sign, plain)
    return text


def tables(comparison: Comparison) -> list[Table]:
    """Changes, cost, tasks if there are any, and where there is a run to pair with, the intervals against it."""
    result = [
        Table("changes", TITLES["changes"], *_changes(comparison)),
        Table("cost", TITLES["cost"], COST_COLUMNS, list(_rows(comparison, _cost_of_group, _cost))),
    ]
    if any(one.tasks for one in comparison.runs):
        result.append(Table("tasks", TITLES["tasks"], *_tasks(comparison)))
    if comparison.against is not None:
        result.append(_paired(comparison))
    return result


def as_text(comparison: Comparison) -> str:
    """The tables and the notes, for the screen."""
    return "\n\n".join(
        [*(table.text for table in tables(comparison)), *(f"note: {line}" for line in comparison.notes)]
    )


def _rows(
    comparison: Comparison,
    of_group: Callable[[ComparedGroup], list[Cell]],
    of_run: Callable[[ComparedRun], list[Cell]],
) -> Iterator[Row]:
    """A row for each run, and above those that differ by seed alone one for all of them."""
    runs = {one.name: one for one in comparison.runs}
    for group in comparison.groups:
        several = len(group.runs) > 1
        if several:
            yield Row(f"{group.name}, {len(group.runs)} seeds", of_group(group))
        for name in group.runs:
            yield Row(name, of_run(runs[name]), depth=int(several))


def _columns(comparison: Comparison) -> list[tuple[str, str]]:
    """(kind, set) of each column of changes; a set named "" stands for the mean of its kind."""
    found: list[tuple[str, str]] = []
    for kind, _ in SETS:
        names = list(dict.fromkeys(name for one in comparison.runs for name in getattr(one, kind)))
        found += [(kind, "")] if kind != "watch" and names else []
        found += [(kind, name) for name in names]
    return found


def _changes(comparison: Comparison) -> tuple[list[str], list[Row]]:
    columns = _columns(comparison)
    titles = dict(SETS)

    def of_group(group: ComparedGroup) -> list[Cell]:
        found = (group.changes.get(name) if name else group.means.get(kind) for kind, name in columns)
        return [Cell(with_deviation(one)) for one in found]

    def of_run(one: ComparedRun) -> list[Cell]:
        return [_mean(one, kind) if not name else _change(one.changes.get(name)) for kind, name in columns]

    return [name or f"{titles[kind]} mean" for kind, name in columns], list(_rows(comparison, of_group, of_run))


def _mean(one: ComparedRun, kind: str) -> Cell:
    return Cell(percent(one.means[kind]) if kind in one.means else MISSING)


def _change(change: Change | None, *, interval: bool = False) -> Cell:
    if change is None:
        return Cell(MISSING)
    text = percent(change.percent)
    return Cell(f"{text} ± {change.interval:.1f}" if interval and change.interval is not None else text, tone(change))


COST_COLUMNS = ["trained", "in stage 2", "total", "active", "tokens", "in stage 2", "FLOPs", "time"]


def _cost(one: ComparedRun) -> list[Cell]:
    trained = [
        one.parameters.get(f"{stage}_trained") if stage in one.tokens else None for stage in ("stage1", "stage2")
    ]
    parameters = [*trained, one.parameters.get("total"), one.parameters.get("active")]
    numbers = [*parameters, one.tokens.get("stage1"), one.tokens.get("stage2")]
    cells = [MISSING if number is None else short(number) for number in numbers]
    cells.append(MISSING if one.flops is None else f"{one.flops:.2e}")
    cells.append(MISSING if one.seconds is None else duration(one.seconds))
    return [Cell(text) for text in cells]


def _cost_of_group(group: ComparedGroup) -> list[Cell]:
    """The time alone: the rest is the same for every seed."""
    time = group.seconds
    text = MISSING if time is None else f"{duration(time.mean)} ± {duration(time.deviation or 0.0)}"
    return [*[Cell("")] * (len(COST_COLUMNS) - 1), Cell(text)]


def _tasks(comparison: Comparison) -> tuple[list[str], list[Row]]:
    runs = {one.name: one for one in comparison.runs}
    columns = list(dict.fromkeys(name for one in comparison.runs for name in one.tasks))

    def of_run(one: ComparedRun) -> list[Cell]:
        return [Cell(with_error(one.tasks[name], " ± ") if name in one.tasks else MISSING) for name in columns]

    def of_group(group: ComparedGroup) -> list[Cell]:
        found = [[runs[run].tasks[name].value for run in group.runs if name in runs[run].tasks] for name in columns]
        return [
            Cell(f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}" if len(values) > 1 else MISSING)
            for values in found
        ]

    return columns, list(_rows(comparison, of_group, of_run))


def _paired(comparison: Comparison) -> Table:
    names = [name for _, name in _columns(comparison) if name]
    runs = [one.name for one in comparison.runs if one.name in comparison.paired]
    rows = [Row(run, [_change(comparison.paired[run].get(name), interval=True) for name in names]) for run in runs]
    title = f"Bits against {comparison.against}, in percent; ± is a paired 95 % interval over documents"
    return Table("against", title, names, rows)


def percent(value: float) -> str:
    """A change with its sign."""
    return f"{value:+.1f}".replace("-", "−")


def with_deviation(spread: Spread | None) -> str:
    """A mean, with the standard deviation where there is one."""
    if spread is None:
        return MISSING
    return percent(spread.mean) + (f" ± {spread.deviation:.1f}" if spread.deviation is not None else "")
