"""The report of a run: one HTML file that needs nothing else."""

from arat_fast.report.report import write_report

__all__ = ["write_report"]
