"""Puts the report together: one HTML file that loads nothing from elsewhere."""

import json
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from pipeline.files import write_text
from pipeline.report import FILE_NAME, summary
from pipeline.report.data import RunData, read_run
from pipeline.report.sections import picture_sections

_HERE = Path(__file__).parent


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
    # Everything from the run is escaped by jinja2; only our own files and plotly's script are not.
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sections = picture_sections(data)
    charts = [chart for section in sections for chart in section.charts]
    figures = [json.loads(panel.to_json()) for chart in charts for panel in chart.panels.values()]
    return environment.get_template("page.html").render(
        data=data,
        sentence=summary.sentence(data),
        tiles=summary.tiles(data),
        results=summary.results(data.evaluation) if data.evaluation else None,
        not_evaluated=summary.NOT_EVALUATED,
        sections=sections,
        figures=figures,
        steps=summary.steps_table(data),
        versions=summary.versions(data),
        css=_own("page.css"),
        script=_own("page.js"),
        plotly=Markup(get_plotlyjs()),  # noqa: S704 - the library's own text
    )


def _own(name: str) -> Markup:
    return Markup((_HERE / name).read_text(encoding="utf-8"))  # noqa: S704 - this package's own text
