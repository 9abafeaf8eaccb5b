"""The last step: everything measured, as a page and a table."""

from collections.abc import Sequence

from pipeline.records.evaluation import Evaluation
from pipeline.records.run_folder import EVALUATION_FILE, REPORT_FILE
from pipeline.records.step_manifest import StepManifest
from pipeline.run.context import RunContext
from pipeline.run.step import Result

TEMPLATE = "launch/runs/my-languages.yaml"


def write_report(context: RunContext, steps: Sequence[str]) -> Result:
    """report.html, and the table.

    Args:
        context: the run.
        steps: the names of all steps, in order.
    """
    from pipeline.report.page import write_page

    path = context.folder / REPORT_FILE
    write_page(context.folder, steps)
    evaluation = Evaluation.load_if_there(context.folder / EVALUATION_FILE)
    if evaluation is not None:
        print("\n" + summary(context, evaluation, steps), flush=True)
    print(f"report: {path}       next: copy {TEMPLATE}, put in your model and languages", flush=True)
    return Result()


def summary(context: RunContext, evaluation: Evaluation, steps: Sequence[str]) -> str:
    """The tables and the line of figures."""
    from pipeline.evaluation.task_table import task_table
    from pipeline.report.continuations import continuations_text
    from pipeline.report.result_table import figures_line, result_table

    manifests = context.folder.manifests(steps)
    stages = [manifests[stage].figures for stage in context.stages if stage in manifests]
    line = figures_line(
        evaluation.parameters,
        stages[0]["tokens_per_second"],
        max(figures["peak_memory_gb"] for figures in stages),
        sum(_seconds(manifest) for manifest in manifests.values()) / 60,
    )
    tables = [result_table(evaluation), *([task_table(evaluation)] if evaluation.tasks else [])]
    texts = ["", continuations_text(evaluation)] if evaluation.continuations else []
    return "\n".join(["\n\n".join(tables), line, *texts])


def _seconds(manifest: StepManifest) -> float:
    return float(manifest.figures.get("seconds", 0.0))
