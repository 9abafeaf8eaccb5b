"""`statistics.html`: a store's figures as a page with plots, which loads nothing from elsewhere."""

import json
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

import pipeline.report
from data_prep.charts import REASONS, part_of, pictures
from data_prep.store import TokenStore
from pipeline.files import write_text

FILE_NAME = "statistics.html"
_REPORT = Path(pipeline.report.__file__).parent  # its style and script draw this page too


def write_page(store: TokenStore) -> Path:
    """Write the page into the store's folder; returns its path."""
    statistics = store.statistics
    charts = pictures(statistics)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html").render(
        store=store,
        sets=statistics.sets,
        part_of=part_of,
        reasons={reason: title for reason, (title, _) in REASONS.items()},
        charts=charts,
        figures=[json.loads(chart.figure.to_json()) for chart in charts],
        css=_own("page.css"),
        script=_own("page.js"),
        plotly=Markup(get_plotlyjs()),  # noqa: S704 - the library's own text
    )
    path = store.folder / FILE_NAME
    write_text(path, page)
    return path


def _own(name: str) -> Markup:
    return Markup((_REPORT / name).read_text(encoding="utf-8"))  # noqa: S704 - this product's own text
