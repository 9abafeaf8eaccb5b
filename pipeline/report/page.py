"""Puts the report together: one HTML file that loads nothing from elsewhere."""

from collections.abc import Sequence
from pathlib import Path

from common.files import write_text
from common.html.render import render
from pipeline.evaluation.task_table import task_rows
from pipeline.records.run_folder import REPORT_FILE, RunFolder
from pipeline.report import summary
from pipeline.report.data import RunData, read_run, stage_label
from pipeline.report.sections import picture_sections


def write_page(folder: RunFolder, steps: Sequence[str]) -> None:
    """Write ``report.html`` into a run's folder from what lies there.

    A part whose files are missing is left out with a sentence that says why.

    Args:
        folder: the run's.
        steps: the names of all steps, in order.

    Raises:
        UserError: the folder holds no run, or a file in it is damaged.
    """
    write_text(folder / REPORT_FILE, _render(read_run(folder, steps)))


def _render(data: RunData) -> str:
    sections = picture_sections(data)
    found = data.evaluation
    charts = [chart for section in sections for chart in section.charts]
    return render(
        Path(__file__).with_name("page.html"),
        [panel for chart in charts for panel in chart.panels.values()],
        data=data,
        sentence=summary.sentence(data),
        tiles=summary.tiles(data),
        warnings=summary.warnings(data),
        results=summary.results(data.evaluation) if data.evaluation else None,
        not_evaluated=summary.NOT_EVALUATED,
        task_rows=task_rows(found.tasks, {label: stage_label(label) for label in found.checkpoints}) if found else [],
        sections=sections,
        label_of=stage_label,
        steps=summary.steps_table(data),
        versions=summary.versions(data),
    )
