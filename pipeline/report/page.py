"""Puts the report together: one HTML file that loads nothing from elsewhere."""

from pathlib import Path

from common.files import write_text
from common.html.render import render
from pipeline.report import FILE_NAME, summary
from pipeline.report.data import RunData, read_run
from pipeline.report.sections import picture_sections


def write_report(run_folder: Path) -> Path:
    """Write ``report.html`` into a run's folder from what lies there, and return its path.

    A part whose files are missing is left out with a sentence that says why.

    Raises:
        UserError: the folder holds no run, or a file in it is damaged.
    """
    path = run_folder / FILE_NAME
    write_text(path, _render(read_run(run_folder)))
    return path


def _render(data: RunData) -> str:
    sections = picture_sections(data)
    charts = [chart for section in sections for chart in section.charts]
    return render(
        Path(__file__).with_name("page.html"),
        [panel for chart in charts for panel in chart.panels.values()],
        data=data,
        sentence=summary.sentence(data),
        tiles=summary.tiles(data),
        results=summary.results(data.evaluation) if data.evaluation else None,
        not_evaluated=summary.NOT_EVALUATED,
        sections=sections,
        steps=summary.steps_table(data),
        versions=summary.versions(data),
    )
