"""Which pictures a report shows, in which order, and the sentence beneath each."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import plotly.graph_objects as go

from common.html.style import set_colors
from data_prep.statistics import charts as text_charts
from pipeline.model.expert_plan import ExpertPlan
from pipeline.records.evaluation import BASE, Evaluation, StageRouting
from pipeline.records.metrics import StepRow
from pipeline.report import charts, curves, summary
from pipeline.report.data import RunData, Stage, stage_label

Width = Literal["full", "half", "third"]


@dataclass(frozen=True)
class Chart:
    """A picture, its title, and what it is and what is good; several panels stand side by side, each with its name."""

    panels: dict[str, go.Figure]
    title: str
    caption: str
    width: Width = "full"

    @classmethod
    def single(cls, figure: go.Figure, title: str, caption: str, width: Width = "full") -> "Chart":
        """A picture of one panel, which needs no name."""
        return cls({"": figure}, title, caption, width)


@dataclass(frozen=True)
class Section:
    """A part of the page; ``missing`` says why a picture is not there, ``notes`` are sentences beneath the title."""

    key: str
    title: str
    charts: list[Chart] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def picture_sections(data: RunData) -> list[Section]:
    """All sections that hold pictures, the one beside the results table first; a baseline has no experts to show."""
    if data.baseline:
        training = _training(data, data.stages["stage1"])
        return [_results(data), *_tasks(data), *_continuations(data), *_text(data), training, _validation(data)]
    return [
        _results(data),
        *_tasks(data),
        *_continuations(data),
        _experts(data),
        *_text(data),
        *(_training(data, stage) for stage in data.stages.values()),
        _validation(data),
        _routing(data),
    ]


def _results(data: RunData) -> Section:
    section = Section("results", "Bits per character")
    if data.evaluation is not None:
        names = [name for name in data.set_names() if name in data.evaluation.sets]
        section.charts.append(
            Chart.single(
                charts.results_by_set(data.evaluation, names),
                "The same at a glance",
                "Each mark is one checkpoint on one set: left is better; old languages should at least stay put.",
            )
        )
    return section


def _tasks(data: RunData) -> list[Section]:
    """The table of lm-eval's tasks, if the run was asked for any; the page puts it there."""
    if data.evaluation is None or not data.evaluation.tasks:
        return []
    note = (
        "Each checkpoint on tasks of lm-eval; ± is one standard error over documents, as lm-eval computes it, or for "
        "bits and perplexities of whole documents that of a ratio of sums. A group's row stands for its tasks'."
    )
    return [Section("tasks", "Tasks", notes=[note])]


def _continuations(data: RunData) -> list[Section]:
    """What models go on with from the run's prompts, if it has any; the page puts the texts there."""
    if data.evaluation is None or not data.evaluation.continuations:
        return []
    return [Section("continuations", "How they go on", notes=["Each token is the likeliest after those before it."])]


def _text(data: RunData) -> list[Section]:
    """What was trained on and what was left out of it, if the tokenize step says so."""
    if data.text is None:
        return []
    found = [Chart.single(chart, title, caption) for chart, title, caption in text_charts.pictures(data.text)]
    warnings = [entry.warning for entry in data.text.sets.values() if entry.warning]
    return [Section("text", "Text", found, warnings)]


def _experts(data: RunData) -> Section:
    section = Section("experts", "Experts and similarity")
    if data.plan is None:
        section.missing.append("Experts by layer: none are allocated yet, expert_plan.json is not in the folder.")
    else:
        new = sum(data.plan.num_new)
        section.charts.append(
            Chart.single(
                charts.experts_by_layer(data.plan),
                "Experts by layer",
                f"Each layer's experts, {new} of them new: most should be where the languages are least alike; "
                "a diamond marks a layer where a classifier leaves old-language tokens to the experts of their time.",
            )
        )
        section.notes.extend(_ancestry(data.plan))
    if data.similarity is None:
        section.missing.append(
            "Similarity by layer: similarity.json is not in the folder; only allocation: layerwise measures it."
        )
    else:
        section.charts.append(
            Chart.single(
                charts.similarity_by_layer(data.similarity),
                "Similarity by layer",
                "How alike the languages' hidden states are at each layer (mean cosine, a thin line a pair; S lies "
                "midway between the means of green and amber lines): where S is low, a layer gets more experts.",
            )
        )
    return section


def _ancestry(plan: ExpertPlan) -> list[str]:
    """Which experts each expansion added, where there was more than one."""
    if plan.num_groups < 3:
        return []
    sources = {"expert 0": "the original MLP", "most used expert": "the most used expert of their layer"}
    dense, *added = plan.rounds
    lines = [f"Round 0, the dense model: {', '.join(dense.languages)}."]
    for number, one in enumerate(added, 1):
        where = sum(num > 0 for num in one.num_new)
        lines.append(
            f"Round {number}: {', '.join(one.languages)}; {sum(one.num_new)} new experts in {where} layers, copies of "
            f"{sources[one.source]}."
        )
    return lines


_LOSS_CAPTIONS = {
    "balance": (
        "Load balancing loss",
        "How unevenly tokens spread over experts: 1 is even (2 with balance_scale: reference), lower is better.",
    ),
    "lpr": (
        "LPR loss",
        "How far the routers are from giving old-language tokens to the experts of their own time alone, at first "
        "expert 0: lower is better.",
    ),
    "classifier": (
        "Classifier loss",
        "How badly the classifiers tell old from new: lower is better, 0.69 is guessing.",
    ),
    "router_kl": ("Router KL", "How far new-language tokens are routed from where stage 1 sent them: 0 is as there."),
    "router_z": ("Router z-loss", "The squared logsumexp of the routers' logits: it keeps them small."),
}


def _training(data: RunData, stage: Stage) -> Section:
    section = Section(stage.name, f"Training, {stage.label}")
    if not stage.rows:
        section.missing.append(_why_not_trained(data, stage))
        return section
    section.notes.extend(summary.slowest_ranks(stage))
    section.charts.append(
        Chart.single(
            curves.curve(stage, lambda row: row.loss.get("next_token"), y="nats per token", digits=".3f", tall=True),
            "Next-token loss",
            "The loss on the training text, which should fall and level off; drag to zoom, double-click to go back.",
        )
    )
    if not data.baseline:
        section.charts.extend(_routing_curves(data, stage))
    small: list[tuple[str, Callable[[StepRow], float | None], str, bool, str]] = [
        ("Learning rate", lambda row: row.lr, ".2e", False, "The size of a step: warm-up, then decay."),
        (
            "Gradient norm",
            lambda row: row.grad_norm,
            ".3f",
            True,
            "The gradient's length before clipping: calm is good.",
        ),
        (
            "Tokens per second",
            lambda row: row.tokens_per_second,
            ",.0f",
            True,
            "Training speed over all ranks: flat is good.",
        ),
    ]
    if any(row.mfu is not None for row in stage.rows):
        caption = "The method's operations over what the devices could do: higher is better."
        small.append(("Model FLOPs utilization", lambda row: row.mfu, ".1%", True, caption))
    for title, value, digits, smooth, caption in small:
        chart = curves.curve(stage, value, y="", digits=digits, smooth=smooth)
        section.charts.append(Chart.single(chart, title, caption, "third"))
    return section


def _routing_curves(data: RunData, stage: Stage) -> list[Chart]:
    """The stage's other losses and the share of expert 0, in one row."""
    kinds = [kind for kind in _LOSS_CAPTIONS if any(row.loss.get(kind) for row in stage.rows)]
    width: Width = "third" if len(kinds) == 2 else "half"
    result = []
    for kind in kinds:
        chart = curves.curve(stage, lambda row, kind=kind: row.loss.get(kind), y="", digits=".4f")  # type: ignore[misc]
        result.append(Chart.single(chart, *_LOSS_CAPTIONS[kind], width))
    caption = "Share of each set's training tokens that use the original MLP, the mean over layers"
    caption += ": old languages should rise above new ones." if stage.name == "stage2" else "."
    chart = curves.expert_0_share(stage, set_colors(data.set_names()))
    return [*result, Chart.single(chart, "Tokens on expert 0", caption, width)]


def _why_not_trained(data: RunData, stage: Stage) -> str:
    if data.settings.get(stage.name) is None:
        return f"This run has no {stage.label}: {stage.name} is not in its run.yaml."
    return f"{stage.label.capitalize()} has not run yet: {stage.name}/metrics.jsonl holds no step."


def _validation(data: RunData) -> Section:
    section = Section("validation", "Validation while training")
    stages = [stage for stage in data.stages.values() if stage.rows or stage.validations]
    if not any(stage.validations for stage in stages):
        section.missing.append(
            "No validation was made while training; validate.every_tokens in run.yaml asks for it."
            if stages
            else "Training has not begun, so nothing has been validated yet."
        )
        return section
    section.charts.append(
        Chart.single(
            curves.validation(stages, set_colors(data.set_names())),
            "Bits per character by set",
            "On the head of each held-out set, so not comparable with the table above: new languages should fall, old "
            "ones stay; a star marks each stage's best checkpoint.",
        )
    )
    return section


def _routing(data: RunData) -> Section:
    section = Section("routing", "Routing on held-out text")
    routing = data.evaluation.routing if data.evaluation else {}
    if not routing:
        section.missing.append("No routing was measured: evaluation.json is not there or holds none.")
    maps = (
        (
            "expert_0_share",
            "Tokens that use expert 0",
            "of tokens use expert 0",
            "How many of a set's tokens use the original MLP at each layer, on one colour scale: after stage 2 old "
            "languages should be dark, new ones lighter; a layer of two experts with top_k 2 is always at 100 %.",
        ),
        (
            "probability_0",
            "Router probability of expert 0",
            "mean probability",
            "The mean of G_0, which the LPR loss raises for old languages, on one colour scale: after stage 2 old "
            "languages should be darker than new ones.",
        ),
    )
    for field_name, title, value, caption in maps:
        if routing:
            section.charts.append(Chart(_maps(data, routing, field_name, value), title, caption))
    if data.evaluation is not None and data.plan is not None:
        section.notes.extend(_own_experts(data.evaluation, data.plan))
    _add_classified(section, data)
    _add_load(section, data)
    return section


def _own_experts(evaluation: Evaluation, plan: ExpertPlan) -> list[str]:
    """Whether earlier rounds' languages still use the experts of their time."""
    lines = []
    for name, by_label in evaluation.own_experts.items():
        shares = ", ".join(f"{share:.1%} {_when(label)}" for label, share in by_label.items())
        number = plan.round_of(evaluation.sets[name].language)
        lines.append(f"{name}, of round {number}: {shares} of its routing weight is on the experts of its time.")
    return lines


def _when(label: str) -> str:
    return "before" if label == BASE else f"after {stage_label(label)}"


def _maps(data: RunData, routing: dict[str, StageRouting], field_name: str, value: str) -> dict[str, go.Figure]:
    """The same map after each stage, on one colour scale; probabilities' scale ends at the largest value of all."""
    everything = [v for r in routing.values() for s in r.sets.values() for v in getattr(s, field_name)]
    limits = (0.0, max(everything, default=1.0) if field_name == "probability_0" else 1.0)
    return {
        f"after {stage_label(stage)}": charts.heat_map(
            shares, field_name, [n for n in data.set_names() if n in shares.sets], limits=limits, value=value
        )
        for stage, shares in routing.items()
    }


def _add_classified(section: Section, data: RunData) -> None:
    """How the classifiers call held-out text; they train in stage 2 only."""
    routing = data.evaluation.routing.get("stage2") if data.evaluation else None
    if data.plan is None or not data.plan.classifier_layers or routing is None:
        return
    if not all(shares.classified_old for shares in routing.sets.values()):
        return
    shown = _classifier_layers_only(data.plan, routing)
    (chart,) = _maps(data, {"stage2": shown}, "classified_old", "of tokens are called old").values()
    caption = (
        "Tokens that each routing classifier takes for old: near 100 % for old sets and 0 % for new ones is good."
    )
    section.charts.append(Chart.single(chart, "Classified as old, after stage 2", caption, "half"))


def _classifier_layers_only(plan: ExpertPlan, routing: StageRouting) -> StageRouting:
    """The same without the layers that have no classifier, whose share is 0 by definition."""
    keep = [index for index, layer in enumerate(routing.layers) if layer in plan.classifier_layers]
    sets = {
        name: shares.model_copy(update={"classified_old": [shares.classified_old[index] for index in keep]})
        for name, shares in routing.sets.items()
    }
    return StageRouting(layers=[routing.layers[index] for index in keep], sets=sets)


def _add_load(section: Section, data: RunData) -> None:
    stages = [stage for stage in data.stages.values() if any(row.load_imbalance for row in stage.rows)]
    if data.plan is None or not stages:
        section.missing.append("Load by layer: no step's load was recorded, or expert_plan.json is not there.")
        return
    section.charts.append(
        Chart.single(
            charts.load_imbalance(stages, list(data.plan.moe_layers)),
            "Load imbalance by layer",
            "The busiest expert's tokens over the mean, on training text, in the first and last tenth of each stage: "
            "1 is even; in stage 2 old-language tokens gather on expert 0, so a rise there is meant.",
            "half" if section.charts and section.charts[-1].width == "half" else "full",
        )
    )
