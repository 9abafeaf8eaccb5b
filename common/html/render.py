"""Pages of HTML that load nothing from elsewhere: this product's frame, style and script around a page's own part."""

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.graph_objects import Figure
from plotly.offline import get_plotlyjs

_HERE = Path(__file__).parent


def render(template: Path, figures: list[Figure], **values: Any) -> str:
    """A template that extends ``frame.html``; its picture number n is drawn into the element ``chart-n``."""
    # All values are escaped by jinja2; only our own files and plotly's script are not.
    environment = Environment(
        loader=FileSystemLoader([template.parent, _HERE]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(
        **values,
        figures=[json.loads(figure.to_json()) for figure in figures],
        css=_own("page.css"),
        script=_own("page.js"),
        plotly=Markup(get_plotlyjs()),  # noqa: S704 - the library's own text
    )


def _own(name: str) -> Markup:
    return Markup((_HERE / name).read_text(encoding="utf-8"))  # noqa: S704 - this package's own text
