"""A `gradshield filter` run as one static HTML file."""

from gradshield.report.page import ReportRow, write_report

__all__ = ["ReportRow", "write_report"]
