"""Pictures of the model and of what was evaluated: experts, similarity, results by set, routing."""

import plotly.graph_objects as go

from common.html.style import ACCENT, AMBER, CHECKPOINTS, GREEN, GREY, SCALE, figure, label
from pipeline.model.expert_plan import ExpertPlan
from pipeline.records.evaluation import Evaluation, StageRouting
from pipeline.records.similarity import Similarity
from pipeline.report.data import Stage, stage_label

# Stage 1 is a ring, so that stage 2's dot shows inside it where both agree.
_MARKERS = {
    "base": {"size": 10, "color": CHECKPOINTS["base"]},
    "stage1": {"size": 13, "symbol": "circle-open", "color": CHECKPOINTS["stage1"], "line": {"width": 2.5}},
    "stage2": {"size": 8, "color": CHECKPOINTS["stage2"]},
}
_ROUNDS = (ACCENT, GREEN, "#c65b94", "#8a6be0")


def experts_by_layer(plan: ExpertPlan) -> go.Figure:
    """Bars of N_l: the original MLP, then each round's new experts; a diamond where a classifier stands."""
    chart = figure(x="decoder layer", y="experts", height=280)
    layers = list(range(plan.num_layers))
    bar = {"x": layers, "type": "bar"}
    chart.add_bar(**bar, y=[1] * len(layers), name="expert 0 (original MLP)", marker_color=GREY)
    for number, added in enumerate(plan.rounds[1:]):
        name = f"new, for {', '.join(map(label, added.languages))}"
        chart.add_bar(**bar, y=list(added.num_new), name=name, marker_color=_ROUNDS[number % len(_ROUNDS)])
    chart.update_traces(hovertemplate="layer %{x}: %{y}<extra>%{fullData.name}</extra>")
    if plan.classifier_layers:
        chart.add_scatter(
            x=list(plan.classifier_layers),
            y=[plan.counts[layer] + 0.35 for layer in plan.classifier_layers],
            mode="markers",
            name="routing classifier",
            marker={"symbol": "diamond", "size": 8, "color": AMBER},
            hovertemplate="layer %{x} has a classifier<extra></extra>",
        )
    chart.update_layout(barmode="stack", bargap=0.25, showlegend=True)
    chart.update_xaxes(range=[-0.7, plan.num_layers - 0.3])
    chart.update_yaxes(dtick=1 if max(plan.counts) <= 10 else None)
    return chart


def similarity_by_layer(similarity: Similarity) -> go.Figure:
    """S_l as a thick line; each pair of languages thin, dotted where it does not enter S_l."""
    chart = figure(x="decoder layer", y="mean cosine", height=300, zoom=True)
    layers = list(range(len(similarity.by_layer)))
    kinds = {"new with new": GREEN, "new with old": AMBER, "not in S": GREY}
    shown: set[str] = set()
    for pair, values in sorted(similarity.pairs.items()):
        first, _, second = pair.partition("&")
        kind = _pair_kind(first, second, similarity)
        chart.add_scatter(
            x=layers,
            y=values,
            mode="lines",
            name=kind,
            legendgroup=kind,
            showlegend=kind not in shown,
            line={"width": 1.1, "color": kinds[kind], "dash": "dot" if kind == "not in S" else "solid"},
            hovertemplate=f"{label(first)} and {label(second)}: %{{y:.3f}}<extra></extra>",
        )
        shown.add(kind)
    chart.add_scatter(
        x=layers,
        y=similarity.by_layer,
        mode="lines+markers",
        name="S, which experts are allocated by",
        line={"width": 3, "color": ACCENT},
        marker={"size": 5},
        hovertemplate="S: %{y:.3f}<extra></extra>",
    )
    chart.update_layout(hovermode="x unified")
    chart.update_xaxes(range=[-0.7, len(layers) - 0.3])
    return chart


def _pair_kind(first: str, second: str, similarity: Similarity) -> str:
    """Which mean of S_l a pair enters; a language with itself does only where it is the one new language."""
    num_new = (first in similarity.new) + (second in similarity.new)
    if num_new == 0 or (first == second and len(similarity.new) > 1):
        return "not in S"
    return "new with new" if num_new == 2 else "new with old"


def results_by_set(evaluation: Evaluation, names: list[str]) -> go.Figure:
    """Bits per character of each set, a dot a checkpoint, joined by a line."""
    chart = figure(x="bits per character", y="", height=110 + 34 * len(names))
    labels = [label(name) for name in names]
    for name, text in zip(names, labels, strict=True):
        values = list(evaluation.sets[name].bits_per_character.values())
        chart.add_scatter(
            x=[min(values), max(values)],
            y=[text, text],
            mode="lines",
            line={"width": 2, "color": GREY},
            opacity=0.45,
            showlegend=False,
            hoverinfo="skip",
        )
    for checkpoint in evaluation.checkpoints:
        chart.add_scatter(
            x=[evaluation.sets[name].bits_per_character.get(checkpoint) for name in names],
            y=labels,
            mode="markers",
            name=stage_label(checkpoint),
            marker=_MARKERS.get(checkpoint, _MARKERS["stage2"]),
            hovertemplate="%{y}: %{x:.3f}<extra>%{fullData.name}</extra>",
        )
    chart.update_yaxes(autorange="reversed", type="category", showgrid=False)
    chart.update_xaxes(showgrid=True)
    return chart


def heat_map(
    routing: StageRouting, field: str, names: list[str], *, limits: tuple[float, float], value: str
) -> go.Figure:
    """Layer by set of one of :class:`Shares`' fields, for the layers that ``routing`` names.

    Args:
        routing: of one checkpoint.
        field: which of the fields.
        names: the sets, from top to bottom.
        limits: the ends of the colour scale; give several maps the same to compare them.
        value: what a cell is, for its hover text.
    """
    chart = figure(x="decoder layer", y="", height=90 + 26 * len(names))
    chart.add_heatmap(
        x=[str(layer) for layer in routing.layers],
        y=[label(name) for name in names],
        z=[getattr(routing.sets[name], field) for name in names],
        zmin=limits[0],
        zmax=limits[1],
        colorscale=SCALE,
        xgap=1,
        ygap=2,
        colorbar={"thickness": 9, "outlinewidth": 0, "tickformat": ".0%", "len": 1.0, "xpad": 6, "ypad": 0},
        hovertemplate=f"layer %{{x}}, %{{y}}: %{{z:.1%}} {value}<extra></extra>",
    )
    chart.update_xaxes(type="category", tickangle=0, nticks=min(8, len(routing.layers)))
    chart.update_yaxes(autorange="reversed", type="category", showgrid=False)
    return chart


def load_imbalance(stages: list[Stage], layers: list[int]) -> go.Figure:
    """The busiest expert's tokens over the mean, per layer: the first and the last tenth of each stage."""
    chart = figure(x="decoder layer", y="busiest expert / mean", height=260)
    for stage in stages:
        rows = [row.load_imbalance for row in stage.rows if len(row.load_imbalance) == len(layers)]
        tenth = max(1, len(rows) // 10)
        color = CHECKPOINTS[stage.name]
        for when, part, width, dash in (("begins", rows[:tenth], 1, "dot"), ("ends", rows[-tenth:], 2, "solid")):
            if not part:
                continue
            chart.add_scatter(
                x=layers,
                y=[sum(column) / len(part) for column in zip(*part, strict=True)],
                mode="lines+markers",
                name=f"as {stage.label} {when}",
                line={"width": width, "color": color, "dash": dash},
                marker={"size": 2 * width + 1},
                hovertemplate="layer %{x}: %{y:.2f}<extra>%{fullData.name}</extra>",
            )
    chart.update_xaxes(range=[layers[0] - 0.7, layers[-1] + 0.7])
    chart.update_yaxes(range=[0.95, None])
    chart.add_hline(y=1, line={"width": 1, "dash": "dot", "color": GREY})
    return chart
