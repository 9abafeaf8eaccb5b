"""What all charts share: colours that read on light and on dark, the layout, and labels.

The page's script adds what depends on light or dark: text, grid and background colours.
"""

from html import escape

import plotly.graph_objects as go

GREY = "#8b95a5"
ACCENT = "#4c7ef3"
AMBER = "#e0952f"
GREEN = "#2ba27d"
_SETS = ("#4c7ef3", "#e07b39", "#2ba27d", "#c65b94", "#8a6be0", "#b8942a", "#3aa6c2", "#d65050")
CHECKPOINTS = {"base": GREY, "stage1": AMBER, "stage2": ACCENT}
# From a colour near the middle of both backgrounds' range to a strong one, even in lightness.
SCALE = [
    [0.0, "#e6ecf4"],
    [0.2, "#b4cde6"],
    [0.4, "#7fa9d8"],
    [0.6, "#4d7fc4"],
    [0.8, "#345fac"],
    [1.0, "#223f87"],
]


def set_colors(names: list[str]) -> dict[str, str]:
    """A colour for each set, the same in every chart of a page."""
    return {name: _SETS[index % len(_SETS)] for index, name in enumerate(names)}


def label(text: str) -> str:
    """A user's name as chart text: plotly reads a few HTML tags in it, so they are escaped."""
    return escape(text, quote=False)


def figure(*, x: str, y: str, height: int = 300, zoom: bool = False) -> go.Figure:
    """An empty chart with the page's layout; ``zoom`` lets the reader drag a range open."""
    axis = {"zeroline": False, "automargin": True, "ticks": "", "ticklabelstandoff": 3, "fixedrange": not zoom}
    title = {"standoff": 8, "font": {"size": 12}}
    result = go.Figure()
    result.update_layout(
        template=None,
        height=height,
        margin={"l": 8, "r": 12, "t": 8, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif", "size": 12},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
        hoverlabel={"align": "left"},
        dragmode="zoom" if zoom else False,
        xaxis={**axis, "title": {"text": x, **title}, "showgrid": False},
        yaxis={**axis, "title": {"text": y, **title}},
    )
    return result
