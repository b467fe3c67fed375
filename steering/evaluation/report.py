"""The suite's results as a table, a JSON file and the effect–perplexity plot."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steering.errors import SpecError
from steering.evaluation.catalogue import COLUMNS, Row, table
from steering.evaluation.suite import Cell, as_json

HEADER = (
    "concept", "prompts", "method", "strength", "effect", "95%", "ppl", "ppl ratio", "distinct-2", "fluency", "effort",
    "v·x", "sd(v·x)", "error",
)  # fmt: skip


def rows(cells: Sequence[Cell]) -> list[tuple[str, ...]]:
    """One row of text per test cell, in the order of `HEADER`; a chosen strength is marked with a star."""

    def number(value: float | None, digits: int = 2) -> str:
        return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"

    return [
        (
            cell.concept,
            cell.kind,
            cell.method,
            "–" if cell.method == "none" else f"{cell.strength:g}{'*' if cell.chosen else ''}",
            number(cell.effect),
            f"{cell.interval[0]:.2f}–{cell.interval[1]:.2f}",
            number(cell.perplexity),
            number(cell.perplexity_ratio),
            number(cell.distinct_2),
            number(cell.fluency),
            number(cell.effort, 3),
            number(cell.tracking_mean),
            number(cell.tracking_sd),
            number(cell.tracking_error),
        )
        for cell in cells
        if cell.split == "test"
    ]


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "".join("| " + " | ".join(row) + " |\n" for row in (header, ["---"] * len(header), *lines))


def write(folder: Path, cells: Sequence[Cell], about: Mapping[str, Any]) -> list[Path]:
    """Write `eval.json`, `eval.md` and, where matplotlib is installed, `eval.png`; returns their paths.

    Raises SpecError when there is no cell to report.
    """
    if not cells:
        raise SpecError("cells", expected="at least one cell of results", got=0)
    folder.mkdir(parents=True, exist_ok=True)
    data, table = folder / "eval.json", folder / "eval.md"
    data.write_text(
        json.dumps({"about": dict(about), "cells": as_json(cells)}, indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )
    table.write_text(markdown(HEADER, rows(cells)), encoding="utf-8")
    try:
        picture = plot(folder / "eval.png", cells)
    except ImportError:
        return [data, table]
    return [data, table, picture]


def write_catalogue(folder: Path, found: Sequence[Row], about: Mapping[str, Any]) -> list[Path]:
    """Write `methods.json` and `methods.md`; returns their paths. Raises SpecError when there is no row to report."""
    if not found:
        raise SpecError("rows", expected="at least one row of results", got=0)
    folder.mkdir(parents=True, exist_ok=True)
    data, page = folder / "methods.json", folder / "methods.md"
    body = {"about": dict(about), "rows": as_json(found)}
    data.write_text(json.dumps(body, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    page.write_text(markdown(COLUMNS, table(found)), encoding="utf-8")
    return [data, page]


def plot(path: Path, cells: Sequence[Cell]) -> Path:
    """Effect against relative perplexity on the tune prompts, a line per method, a panel per concept and kind.

    Raises ImportError without matplotlib (`pip install setpoint[plot]`).
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys((cell.concept, cell.kind) for cell in cells))
    columns = min(4, len(panels))
    figure, axes = pyplot.subplots(
        -(-len(panels) // columns), columns, figsize=(3.4 * columns, 2.8 * -(-len(panels) // columns)), squeeze=False
    )
    for axis, (concept, kind) in zip(axes.flat, panels, strict=False):
        here = [c for c in cells if (c.concept, c.kind, c.split) == (concept, kind, "tune")]
        for method in dict.fromkeys(cell.method for cell in here):
            line = sorted((c for c in here if c.method == method), key=lambda c: c.strength)
            axis.plot(
                [min(c.perplexity_ratio, 4.0) for c in line],
                [c.effect for c in line],
                marker="o",
                ms=3,
                lw=1,
                label=method,
            )
        axis.set(title=f"{concept}, {kind}", xlabel="perplexity ÷ unsteered (≤ 4)", ylabel="effect", ylim=(-0.03, 1.03))
        axis.title.set_size(9)
    for axis in list(axes.flat)[len(panels) :]:
        axis.axis("off")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, fontsize=8)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
