"""The run's report: one HTML page that opens without a network."""

from pathlib import Path

FILE_NAME = "report.html"


def write_report(run_folder: Path) -> Path:
    """Write the report into a run's folder; see :func:`pipeline.report.page.write_report`."""
    from pipeline.report import page  # it loads torch, which whoever only wants a chart's style need not

    return page.write_report(run_folder)


__all__ = ["FILE_NAME", "write_report"]
