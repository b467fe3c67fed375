"""`setpoint eval`: what steering does to a model, measured."""

from __future__ import annotations

from steering.evaluation.report import HEADER, markdown, rows, write
from steering.evaluation.suite import Cell, Suite, run_suite

__all__ = ["HEADER", "Cell", "Suite", "markdown", "rows", "run_suite", "write"]
