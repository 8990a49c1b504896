"""Show a run as one self-contained HTML page.

``run_page`` collects what the page of a run shows, ``figures`` draws its charts as SVG, and ``html_page`` renders it.
``base.html`` is the frame and style of every page, also of the page that :mod:`data_tools.stats` makes.
"""

from megamoe.report.run_page import write_report

__all__ = ["write_report"]
