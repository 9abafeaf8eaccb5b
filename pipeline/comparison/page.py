"""The page of a comparison: one HTML file that loads nothing from elsewhere."""

import math
from collections import Counter
from pathlib import Path

import plotly.graph_objects as go

from common.html.render import render
from common.html.style import GREY, figure, label, set_colors
from pipeline.comparison.table import percent, tables, with_deviation
from pipeline.records.comparison import ComparedGroup, ComparedRun, Comparison
from pipeline.report.summary import short

LARGEST, SMALLEST = 30.0, 8.0  # pixels of a marker
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "star", "hexagon", "triangle-down")
NO_PICTURE = "Gain against forgetting: the runs were scored on no old set, so nothing can be forgotten."


def page(comparison: Comparison) -> str:
    """The HTML."""
    has_picture = all({"new", "old"} <= group.means.keys() for group in comparison.groups)
    return render(
        Path(__file__).with_name("page.html"),
        [gain_against_forgetting(comparison)] if has_picture else [],
        comparison=comparison,
        sentences=_sentences(comparison),
        tables=tables(comparison),
        no_picture=NO_PICTURE,
    )


def _sentences(comparison: Comparison) -> list[str]:
    """Which runs gained most and forgot least."""
    found = []
    for kind, what in (("new", "new languages"), ("old", "old languages")):
        groups = [group for group in comparison.groups if kind in group.means]
        if groups:
            best = min(groups, key=lambda group: group.means[kind].mean)
            found.append(f"Fewest bits on {what}: {best.name}, {with_deviation(best.means[kind])} % on average.")
    return found


def gain_against_forgetting(comparison: Comparison) -> go.Figure:
    """A marker for each run, its area as its parameters; a cross with deviations for the mean of several seeds."""
    chart = figure(x="bits added on old languages, %", y="bits saved on new languages, %", height=460, zoom=True)
    colors = set_colors([group.name for group in comparison.groups])
    symbols = _symbols(colors)
    most = max(one.parameters.get("total", 1) for one in comparison.runs)
    for group in comparison.groups:
        runs = [one for one in comparison.runs if one.group == group.name]
        chart.add_scatter(
            x=[one.means["old"] for one in runs],
            y=[-one.means["new"] for one in runs],
            mode="markers",
            name=label(group.name),
            legendgroup=label(group.name),
            marker={
                "size": [max(SMALLEST, LARGEST * math.sqrt(one.parameters.get("total", 1) / most)) for one in runs],
                "color": colors[group.name],
                "symbol": symbols[group.name],
                "opacity": 0.65 if len(runs) == 1 else 0.35,  # so that the mean shows on them
            },
            text=[_hover(one) for one in runs],
            hovertemplate="%{text}<extra></extra>",
        )
        if len(runs) > 1:
            _add_mean(chart, group, colors[group.name])
    chart.add_vline(x=0, line={"width": 1, "dash": "dot", "color": GREY})
    chart.update_layout(showlegend=True, legend={"itemsizing": "constant"})
    chart.update_xaxes(showgrid=True)
    return chart


def _symbols(colors: dict[str, str]) -> dict[str, str]:
    """A marker for each name, so that those of one colour differ in it."""
    used: Counter[str] = Counter()
    symbols = {}
    for name, color in colors.items():
        symbols[name] = SYMBOLS[used[color] % len(SYMBOLS)]
        used[color] += 1
    return symbols


def _add_mean(chart: go.Figure, group: ComparedGroup, color: str) -> None:
    bar = {"color": color, "thickness": 1.5, "width": 4}
    chart.add_scatter(
        x=[group.means["old"].mean],
        y=[-group.means["new"].mean],
        error_x={"array": [group.means["old"].deviation], **bar},
        error_y={"array": [group.means["new"].deviation], **bar},
        mode="markers",
        name=label(group.name),
        legendgroup=label(group.name),
        showlegend=False,
        marker={"symbol": "x-thin", "size": 9, "line": {"width": 2, "color": color}},
        hovertemplate=f"{label(group.name)}, mean of {len(group.runs)} seeds<extra></extra>",
    )


def _hover(one: ComparedRun) -> str:
    total = short(one.parameters["total"]) if "total" in one.parameters else "unknown"
    return (
        f"{label(one.name)}<br>new {percent(one.means['new'])} %, old {percent(one.means['old'])} %<br>"
        f"{total} parameters"
    )
