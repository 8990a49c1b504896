"""A run as one HTML page that needs nothing but itself."""

from megamoe.report.run_page import write_report

__all__ = ["write_report"]
