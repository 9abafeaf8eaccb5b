"""The run's report: one HTML page that opens without a network."""

from pipeline.report.page import FILE_NAME, write_report

__all__ = ["FILE_NAME", "write_report"]
