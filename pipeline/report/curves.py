"""Curves over a stage's training tokens: losses, learning rate, speed, routing, validation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from common.html.style import AMBER, CHECKPOINTS, GREY, figure, label
from pipeline.records.metrics import StepRow
from pipeline.report.data import Stage

MAX_POINTS = 600
_SMOOTHED_SHARE = 0.05


@dataclass(frozen=True)
class Series:
    """A curve thinned to at most ``MAX_POINTS``: each point is the mean of ``steps_per_point`` steps."""

    tokens: list[int]
    values: list[float]
    steps_per_point: int


def series(rows: Sequence[StepRow], value: Callable[[StepRow], float | None]) -> Series:
    """One figure of each step over the tokens trained on; steps without the figure are left out."""
    points = [(row.tokens, number) for row in rows if (number := value(row)) is not None]
    size = -(-len(points) // MAX_POINTS) or 1
    pieces = [points[start : start + size] for start in range(0, len(points), size)]
    means = [sum(number for _, number in piece) / len(piece) for piece in pieces]
    return Series([piece[-1][0] for piece in pieces], means, size)


def running_mean(values: Sequence[float]) -> list[float]:
    """The mean of each value's neighbourhood, a twentieth of the curve wide."""
    half = max(1, round(len(values) * _SMOOTHED_SHARE / 2))
    windows = [values[max(0, index - half) : index + half + 1] for index in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def curve(
    stage: Stage,
    value: Callable[[StepRow], float | None],
    *,
    y: str,
    digits: str,
    tall: bool = False,
    smooth: bool = True,
) -> go.Figure:
    """One figure over a stage's tokens: every step faint, the running mean strong.

    Args:
        stage: whose steps.
        value: the figure of a step.
        y: what it is, for the axis.
        digits: a d3 format for hover values.
        tall: for the most important curve.
        smooth: false draws the values themselves.
    """
    chart = figure(x=f"tokens of {stage.label}", y=y, height=320 if tall else 200, zoom=True)
    points, color = series(stage.rows, value), CHECKPOINTS[stage.name]
    hover = f"%{{x:.3s}} tokens: %{{y:{digits}}}<extra>%{{fullData.name}}</extra>"
    if smooth:
        chart.add_scatter(
            x=points.tokens,
            y=points.values,
            mode="lines",
            name="each step" if points.steps_per_point == 1 else f"mean of {points.steps_per_point} steps",
            line={"width": 1, "color": color},
            opacity=0.4,
            hovertemplate=hover,
        )
    chart.add_scatter(
        x=points.tokens,
        y=running_mean(points.values) if smooth else points.values,
        mode="lines",
        name="running mean" if smooth else y,
        line={"width": 2.4, "color": color},
        hovertemplate=hover,
    )
    chart.update_layout(showlegend=tall)
    if digits.endswith("e"):
        chart.update_yaxes(tickformat=".0e")
    return chart


def expert_0_share(stage: Stage, colors: dict[str, str]) -> go.Figure:
    """Share of each set's training tokens that use expert 0, the mean over layers."""
    chart = figure(x=f"tokens of {stage.label}", y="", height=200, zoom=True)
    for name in colors:
        points = series(stage.rows, lambda row, name=name: row.expert_0_share.get(name))  # type: ignore[misc]
        if points.values:
            chart.add_scatter(
                x=points.tokens,
                y=running_mean(points.values),
                mode="lines",
                name=label(name),
                line={"width": 2, "color": colors[name]},
                hovertemplate="%{x:.3s} tokens: %{y:.1%}<extra>%{fullData.name}</extra>",
            )
    chart.update_yaxes(tickformat=".0%")
    chart.update_layout(showlegend=True)
    return chart


def validation(stages: list[Stage], colors: dict[str, str]) -> go.Figure:
    """Bits per character by set over both stages' tokens, stage 2 after stage 1; the best checkpoints starred."""
    chart = figure(x="tokens of training, stage 2 after stage 1", y="bits per character", height=380, zoom=True)
    starts, start = {}, 0
    for stage in stages:
        starts[stage.name] = start
        start += stage.tokens
    rows = [(starts[stage.name] + row.tokens, row) for stage in stages for row in stage.validations]
    for name in [*colors, "mean"]:
        values = [(at, row.mean if name == "mean" else row.sets.get(name)) for at, row in rows]
        if all(value is None for _, value in values):
            continue
        is_mean = name == "mean"
        chart.add_scatter(
            x=[at for at, _ in values],
            y=[value for _, value in values],
            mode="lines+markers",
            name="mean of old and new sets" if is_mean else label(name),
            line={
                "width": 2.6 if is_mean else 1.8,
                "color": GREY if is_mean else colors[name],
                "dash": "dash" if is_mean else "solid",
            },
            marker={"size": 5},
            hovertemplate="%{x:.3s} tokens: %{y:.3f}<extra>%{fullData.name}</extra>",
        )
    best = [(starts[stage.name] + row.tokens, row, stage) for stage in stages if (row := stage.best_row)]
    chart.add_scatter(
        x=[at for at, _, _ in best],
        y=[row.mean for _, row, _ in best],
        text=[f"best of {stage.label}: step {row.step}" for _, row, stage in best],
        mode="markers",
        name="best checkpoint",
        marker={"symbol": "star", "size": 15, "color": AMBER, "line": {"width": 1, "color": "#7a4b08"}},
        hovertemplate="%{text}, mean %{y:.3f}<extra></extra>",
    )
    if len(stages) == 2 and all(stage.validations for stage in stages):
        border = starts[stages[1].name]
        chart.add_vline(x=border, line={"width": 1, "dash": "dot", "color": GREY})
        note = {"x": border, "y": 1, "yref": "paper", "showarrow": False, "yanchor": "top"}
        chart.add_annotation(**note, text=" stage 2", xanchor="left")
        chart.add_annotation(**note, text="stage 1 ", xanchor="right")
    return chart
