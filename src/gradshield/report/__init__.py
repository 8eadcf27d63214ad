"""A run as one static HTML file: what `filter` decided, and the trials of `tune`."""

from gradshield.report.filter_page import ReportRow, write_report
from gradshield.report.filter_report import highest, keep_for_report, report_run
from gradshield.report.tune_page import report_trials

__all__ = ["ReportRow", "highest", "keep_for_report", "report_run", "report_trials", "write_report"]
