"""report: what is constrained, how far it has come, and what folding would save."""

from symopt.report.model import report
from symopt.report.rows import Row
from symopt.report.table import Axes, Report

__all__ = ["Axes", "Report", "Row", "report"]
