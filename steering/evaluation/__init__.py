"""`setpoint eval`: what steering does to a model, measured."""

from __future__ import annotations

from steering.evaluation.report import HEADER, markdown, rows, write
from steering.evaluation.suite import Cell, Suite, run_suite
from steering.evaluation.sweep import Sweep, run_sweep

__all__ = ["HEADER", "Cell", "Suite", "Sweep", "markdown", "rows", "run_suite", "run_sweep", "write"]
