"""The report of a run, or of several, as one page that opens offline."""

from reinforcepp.report.command import PAGE, run_report, write_report
from reinforcepp.report.page import report_page

__all__ = ["PAGE", "report_page", "run_report", "write_report"]
