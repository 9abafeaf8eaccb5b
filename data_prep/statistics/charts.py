"""Pictures of what a store holds: how well the tokenizer knows each language, lengths, and what was dropped."""

from typing import NamedTuple

import plotly.graph_objects as go

from common.html.style import ACCENT, AMBER, GREEN, GREY, figure, label, set_colors
from data_prep.statistics.tally import MOST_FERTILITY, PartStatistics
from data_prep.store import SetStatistics, StoreStatistics

REASONS = {
    "empty": ("empty", GREY),
    "too_short": ("too short", "#b8942a"),
    "too_long": ("too long", "#8a6be0"),
    "language": ("another language", AMBER),
    "exact_duplicate": ("exact duplicate", ACCENT),
    "near_duplicate": ("near duplicate", "#3aa6c2"),
    "near_copy": ("copy of held-out text", "#c65b94"),
    "benchmark": ("copy of a benchmark", "#d65050"),
    "over_budget": ("past the budget, in a slice it cuts", GREEN),
}


OF_OWN = "Grey is the model's own tokenizer, before it was extended, on a sample of each slice."


class Picture(NamedTuple):
    """A chart, its title, and what it shows and what is good."""

    figure: go.Figure
    title: str
    caption: str


def pictures(statistics: StoreStatistics) -> list[Picture]:
    """All of them; the last only where anything was dropped."""
    parts = {name: part_of(entry) for name, entry in statistics.sets.items()}
    is_extended = any(part.fertility_before is not None for part in parts.values())
    of_own = f" {OF_OWN}" if is_extended else ""
    found = [
        Picture(
            _bars(
                {name: part.fertility for name, part in parts.items()},
                {name: part.fertility_before for name, part in parts.items()},
                "tokens per word",
            ),
            "Fertility",
            "Tokens the tokenizer needs for a word (for a character where words have no spaces): a language it was "
            f"made for has 1.2 to 2.5; above {MOST_FERTILITY:g} it hardly knows the language.{of_own}",
        ),
        Picture(
            _bars(
                {name: part.characters_per_token for name, part in parts.items()},
                {name: part.characters_per_token_before for name, part in parts.items()},
                "characters per token",
            ),
            "Characters per token",
            "How much text a token holds: more means more text in a sequence and less work for the same "
            f"text.{of_own}",
        ),
        Picture(
            _lengths(statistics),
            "Document lengths",
            "Share of a set's documents by their tokens, in ranges that double; a range stands at its upper end.",
        ),
    ]
    if any(entry.dropped for entry in statistics.sets.values()):
        found.append(
            Picture(
                _dropped(statistics),
                "Dropped",
                "Documents that filters, deduplication and budgets left out, by the reason, of all that were read.",
            )
        )
    return found


def part_of(entry: SetStatistics) -> PartStatistics:
    """What a set is judged by: its training part, or a watch set's held-out one."""
    return entry.train or entry.held_out


def _bars(values: dict[str, float | None], before: dict[str, float | None], x: str) -> go.Figure:
    """A bar per set; above it a grey one of what it was before the tokenizer was extended, where it was."""
    is_extended = any(value is not None for value in before.values())
    chart = figure(x=x, y="", height=90 + (45 if is_extended else 30) * len(values))
    colors = set_colors(list(values))
    if is_extended:
        chart.add_bar(
            x=list(before.values()),
            y=[label(name) for name in before],
            orientation="h",
            marker_color=GREY,
            hovertemplate="%{y}: %{x:.2f} by the model's own tokenizer<extra></extra>",
        )
    chart.add_bar(
        x=list(values.values()),
        y=[label(name) for name in values],
        orientation="h",
        marker_color=[colors[name] for name in values],
        hovertemplate="%{y}: %{x:.2f}<extra></extra>",
    )
    chart.update_yaxes(autorange="reversed", type="category", showgrid=False)
    chart.update_xaxes(showgrid=True, rangemode="tozero")
    chart.update_layout(bargap=0.3, showlegend=False)
    return chart


def _lengths(statistics: StoreStatistics) -> go.Figure:
    chart = figure(x="tokens", y="share of documents", height=300)
    colors = set_colors(list(statistics.sets))
    for name, entry in statistics.sets.items():
        part = part_of(entry)
        chart.add_scatter(
            x=[part_bin.most for part_bin in part.lengths],
            y=[part_bin.documents / max(1, part.documents) for part_bin in part.lengths],
            customdata=[[part_bin.least, part_bin.documents] for part_bin in part.lengths],
            mode="lines+markers",
            name=label(name),
            line={"width": 2, "color": colors[name]},
            marker={"size": 5},
            hovertemplate="%{customdata[0]:,} to %{x:,} tokens: %{customdata[1]:,} documents (%{y:.1%})"
            "<extra>%{fullData.name}</extra>",
        )
    chart.update_xaxes(type="log", showgrid=True)
    chart.update_yaxes(tickformat=".0%", rangemode="tozero")
    chart.update_layout(showlegend=True)
    return chart


def _dropped(statistics: StoreStatistics) -> go.Figure:
    sets = {name: entry for name, entry in statistics.sets.items() if entry.dropped}
    chart = figure(x="share of documents", y="", height=120 + 30 * len(sets))
    totals = {
        name: sum(lost.documents for lost in entry.dropped.values())
        + entry.held_out.documents
        + (entry.train.documents if entry.train else 0)
        for name, entry in sets.items()
    }
    for reason, (title, color) in REASONS.items():
        counts = {name: entry.dropped[reason].documents for name, entry in sets.items() if reason in entry.dropped}
        if counts:
            chart.add_bar(
                x=[count / totals[name] for name, count in counts.items()],
                y=[label(name) for name in counts],
                customdata=list(counts.values()),
                orientation="h",
                name=title,
                marker_color=color,
                hovertemplate="%{y}: %{customdata:,} documents (%{x:.1%})<extra>%{fullData.name}</extra>",
            )
    chart.update_yaxes(autorange="reversed", type="category", showgrid=False)
    chart.update_xaxes(tickformat=".0%", showgrid=True)
    chart.update_layout(barmode="stack", bargap=0.3, showlegend=True)
    return chart
