"""``allocate --budgets``: the plans of several budgets side by side, and what each would take."""

from common.errors import UserError
from common.text_table import aligned
from pipeline.config.run import RunConfig
from pipeline.estimate.report import Estimate, estimate_of
from pipeline.model.expert_plan import ExpertPlan
from pipeline.model.model_folder import model_config
from pipeline.records.similarity import Similarity
from pipeline.run.context import RunContext
from pipeline.run.preparation import known_similarity, plan_experts

MOST = 100_000  # new experts; more is a mistake


def budgets_table(
    context: RunContext, budgets: str, ranks: int | None = None, ep_size: int | None = None, device: str | None = None
) -> str:
    """Experts per layer, parameters, and memory per rank of each stage, a column per budget.

    Args:
        context: the run.
        budgets: numbers of new experts, separated by commas.
        ranks: how many; None for the run's, as for the two after.
        ep_size: ranks per expert-parallel group.
        device: what each rank computes on.

    Raises:
        UserError: these are no budgets, the run's allocation takes none or can't meet one, or similarities lack.
    """
    run, numbers = context.run, _numbers(budgets)
    if run.method.is_dense:
        raise UserError(f"--budgets: method {run.method.name} has no experts; use --set method=moe")
    if run.experts.allocation not in ("layerwise", "uniform"):
        raise UserError(
            f"--budgets: experts.allocation: {run.experts.allocation} takes no budget; use layerwise or uniform"
        )
    num_layers = model_config(context.dense).get_text_config().num_hidden_layers
    found = known_similarity(context, num_layers)
    if found is None and run.experts.allocation == "layerwise":
        raise UserError(
            f"--budgets: {context.folder.path} has no similarity.json yet; measure it first: python -m pipeline run "
            "RUN.yaml --until similarity, or name a file with --set experts.similarity=FILE"
        )
    plans = [plan_experts(_with_budget(run, number), num_layers, found)[0] for number in numbers]
    base = estimate_of(_with_budget(run, numbers[0]), ranks=ranks, ep_size=ep_size, device=device, num_new=numbers[0])
    estimates = [base.with_plan(plan) for plan in plans]
    rows = [["new experts asked for", "S", *map(str, numbers)], *_layer_rows(plans, found), *_figure_rows(estimates)]
    return "\n".join([aligned(rows, numbers_from=1), *_notes(base, plans)])


def _numbers(budgets: str) -> list[int]:
    try:
        numbers = [int(part) for part in budgets.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1 or max(numbers) > MOST:
        raise UserError(
            f"--budgets {budgets}: not numbers of new experts from 1 on; give one or more, such as 30,60,90"
        )
    return numbers


def _with_budget(run: RunConfig, number: int) -> RunConfig:
    return run.model_copy(update={"experts": run.experts.model_copy(update={"num_new": number, "delta": None})})


def _layer_rows(plans: list[ExpertPlan], found: Similarity | None) -> list[list[str]]:
    """The experts of each layer, the original included; c where it has a routing classifier."""
    rows = []
    blank = " " if any(plan.classifier_layers for plan in plans) else ""
    for layer in range(plans[0].num_layers):
        experts = [f"{plan.counts[layer]}{'c' if layer in plan.classifier_layers else blank}" for plan in plans]
        rows.append([f"layer {layer}", f"{found.by_layer[layer]:.3f}" if found else "-", *experts])
    return rows


def _figure_rows(estimates: list[Estimate]) -> list[list[str]]:
    counts = [estimate.counts() for estimate in estimates]
    rows = [["new experts", "", *(str(sum(e.plan.num_new)) for e in estimates)]]
    for key, title in (("total", "parameters, M"), ("active", "active per token, M")):
        rows.append([title, "", *(f"{found[key] / 1e6:,.1f}" for found in counts)])
    rows.append(["ep_size", "", *(str(e.dims.ep_size) for e in estimates)])
    for stage in estimates[0].stages:
        peaks = (f"{e.memory(stage)['peak'] / 1e9:.2f}" for e in estimates)
        rows.append([f"stage {stage.number}, GB of the fullest rank", "", *peaks])
    return rows


def _notes(base: Estimate, plans: list[ExpertPlan]) -> list[str]:
    ranks = f"{base.world_size} rank{'s' if base.world_size > 1 else ''}"
    lines = [f"{ranks} on {base.device.type}; nothing was written"]
    if any(plan.classifier_layers for plan in plans):
        lines.insert(0, "c: with a routing classifier")
    return lines
