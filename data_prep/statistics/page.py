"""`statistics.html`: a store's figures as a page with plots, which loads nothing from elsewhere."""

from pathlib import Path

from common.files import write_text
from common.html.render import render
from data_prep.statistics.charts import REASONS, part_of, pictures
from data_prep.store import TokenStore

FILE_NAME = "statistics.html"


def write_page(store: TokenStore) -> Path:
    """Write the page into the store's folder; returns its path."""
    statistics = store.statistics
    charts = pictures(statistics)
    page = render(
        Path(__file__).with_name("page.html"),
        [chart.figure for chart in charts],
        store=store,
        sets=statistics.sets,
        part_of=part_of,
        reasons={reason: title for reason, (title, _) in REASONS.items()},
        charts=charts,
        lost_any=any(entry.dropped or entry.bad_rows.rows for entry in statistics.sets.values()),
    )
    path = store.folder / FILE_NAME
    write_text(path, page)
    return path
