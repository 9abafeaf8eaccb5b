"""The figures of a run's sets as a page with plots, which loads nothing from elsewhere."""

from pathlib import Path

from common.files import content_key, write_text
from common.html.render import render
from data_prep.statistics.charts import REASONS, part_of, pictures
from data_prep.store import TokenStore


def write_page(store: TokenStore, path: Path) -> None:
    """Write the page of all sets of a store to a file."""
    statistics = store.statistics
    charts = pictures(statistics)
    page = render(
        Path(__file__).with_name("page.html"),
        [chart.figure for chart in charts],
        manifest=store.any_manifest,
        key=content_key(store.keys),
        sets=statistics.sets,
        part_of=part_of,
        reasons={reason: title for reason, (title, _) in REASONS.items()},
        charts=charts,
        lost_any=any(entry.dropped or entry.bad_rows.rows for entry in statistics.sets.values()),
    )
    write_text(path, page)
