"""A study folder in, one self-contained HTML page out."""

from ctlens.study.report.page import write_report

__all__ = ["write_report"]
