"""`setpoint eval`: what steering does to a model, measured."""

from __future__ import annotations

from steering.evaluation.catalogue import COLUMNS, Catalogue, run_catalogue, table
from steering.evaluation.entries import ENTRIES
from steering.evaluation.report import HEADER, markdown, rows, write, write_catalogue
from steering.evaluation.suite import Cell, Suite, run_suite
from steering.evaluation.sweep import Sweep, run_sweep

__all__ = [
    "COLUMNS",
    "ENTRIES",
    "HEADER",
    "Catalogue",
    "Cell",
    "Suite",
    "Sweep",
    "markdown",
    "rows",
    "run_catalogue",
    "run_suite",
    "run_sweep",
    "table",
    "write",
    "write_catalogue",
]
