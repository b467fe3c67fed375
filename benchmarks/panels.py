"""A Grafana dashboard as a picture without Grafana: its own JSON, with answers of a Prometheus.

Takes what the provisioned dashboard has: rows, `stat` and `timeseries` panels on the grid of 24 columns, their titles,
units, limits, thresholds, queries and legends, one variable that matches everything, annotations. What it does not know
is an error: a panel that is left out would look like one that is not there. `benchmarks.dashboard` makes the picture.
"""

from __future__ import annotations

import json
import math
import re
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

COLUMNS = 24
UNIT = 0.62
"""Inches of a column; a line of the grid is half as high."""
LEGEND = 84
"""Letters of a line of the legend, the coloured strokes counted as letters."""
PAGE, PANEL, TEXT, FAINT = "#111217", "#181b1f", "#ccccdc", "#2c3235"
NAMED = {"green": "#73bf69", "red": "#e02f44", "blue": "#5794f2"}
PALETTE = ("#73bf69", "#f2cc0c", "#8ab8ff", "#ff780a", "#f2495c", "#5794f2", "#b877d9")
SCALES: Mapping[str, tuple[tuple[float, str], ...]] = {
    "none": ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, "")),
    "reqps": ((1e3, "k/s"), (1.0, "/s")),
    "s": ((1.0, " s"), (1e-3, " ms"), (1e-6, " µs")),
    "bytes": ((2.0**30, " GiB"), (2.0**20, " MiB"), (2.0**10, " KiB"), (1.0, " B")),
    "percentunit": ((1e-2, " %"),),
}

Series = tuple[dict[str, str], Sequence[float], Sequence[float]]
"""Labels, times and values."""


@dataclass(frozen=True)
class Span:
    """What is asked of Prometheus: times in seconds since 1970, and how far apart servers are asked and points are."""

    start: float
    end: float
    scrape: float
    step: float

    @property
    def rate_interval(self) -> float:
        """Grafana's `$__rate_interval`: a rate over it always has points enough."""
        return max(4 * self.scrape, self.step + self.scrape)

    def filled(self, query: str) -> str:
        """The query with the dashboard's variables filled in; `$instance` is every server."""
        return query.replace("$__rate_interval", f"{self.rate_interval:g}s").replace("$instance", ".*")


@dataclass(frozen=True)
class Prometheus:
    """A Prometheus that is asked over HTTP. Raises OSError where it does not answer."""

    address: str

    def _get(self, path: str, **parameters: str | float) -> Any:
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.address}/api/v1/{path}?{query}", timeout=30) as answer:
            return json.load(answer)["data"]

    def over(self, query: str, span: Span) -> list[Series]:
        """A query over a span."""
        found = self._get("query_range", query=span.filled(query), start=span.start, end=span.end, step=span.step)
        return [
            (one["metric"], *zip(*((float(at), float(value)) for at, value in one["values"]), strict=True))
            for one in found["result"]
        ]

    @property
    def version(self) -> str:
        """Its version."""
        return str(self._get("status/buildinfo")["version"])


def legend(pattern: str, labels: Mapping[str, str]) -> str:
    """A legend with `{{label}}` filled in."""
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda found: labels.get(found[1], ""), pattern).strip()


def quantity(value: float, unit: str) -> str:
    """A value in its unit, with at most three digits that count."""
    scales = SCALES[unit]
    factor, suffix = next((one for one in scales if abs(value) >= one[0]), scales[-1])
    return f"{value / factor:.3g}{suffix}" if value else f"0{scales[-1][1] if unit == 'percentunit' else ''}"


def limit(steps: Sequence[Mapping[str, Any]], value: float) -> str:
    """The colour of the highest threshold that a value has reached."""
    return [NAMED[step["color"]] for step in steps if step["value"] is None or value >= step["value"]][-1]


def gaps(times: Sequence[float], values: Sequence[float], step: float) -> tuple[list[datetime], list[float]]:
    """A line that is broken where points are missing or not a number."""
    at, value = list[datetime](), list[float]()
    for i, (time, one) in enumerate(zip(times, values, strict=True)):
        if i and time - times[i - 1] > 1.5 * step:
            at.append(datetime.fromtimestamp(time - step / 2))
            value.append(math.nan)
        at.append(datetime.fromtimestamp(time))
        value.append(one)
    return at, value


def number(axis: Any, panel: Mapping[str, Any], source: Prometheus, span: Span) -> None:
    """A `stat` panel: the last value of each query, upon the colour that the first has reached."""
    defaults = panel["fieldConfig"]["defaults"]
    found = [
        (legend(target["legendFormat"], labels), values[-1])
        for target in panel["targets"]
        for labels, _, values in source.over(target["expr"], span)
    ]
    axis.set(xticks=[], yticks=[])
    for i, (name, value) in enumerate(found):
        x = (i + 0.5) / len(found)
        size = 40 if len(found) == 1 else 26
        axis.text(x, 0.52, quantity(value, defaults["unit"]), fontsize=size, ha="center", va="center", color="white")
        axis.text(x, 0.16, name, fontsize=9, ha="center", va="center", color="white")
    if found:
        axis.set_facecolor(limit(defaults["thresholds"]["steps"], found[0][1]))
    else:
        _nothing(axis)


def _nothing(axis: Any) -> None:
    axis.text(0.5, 0.5, "No data", transform=axis.transAxes, fontsize=11, ha="center", va="center", color=TEXT)


def lines(axis: Any, panel: Mapping[str, Any], source: Prometheus, span: Span) -> None:
    """A `timeseries` panel: a line for each series of each query, its last value in the legend."""
    from matplotlib.dates import DateFormatter
    from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator

    defaults = panel["fieldConfig"]["defaults"]
    custom, unit = defaults["custom"], defaults["unit"]
    names = list[str]()
    for target in panel["targets"]:
        for labels, times, values in source.over(target["expr"], span):
            colour = PALETTE[len(names) % len(PALETTE)]
            at, value = gaps(times, values, span.step)
            told = [one for one in value if math.isfinite(one)]
            name = f"{legend(target['legendFormat'], labels)}  {quantity(told[-1], unit) if told else '–'}"
            style = "steps-post" if custom.get("lineInterpolation") == "stepAfter" else "default"
            axis.plot(at, value, color=colour, lw=1.3 * custom["lineWidth"], drawstyle=style, label=name)
            stepped = "post" if style == "steps-post" else None
            axis.fill_between(at, value, color=colour, alpha=custom["fillOpacity"] / 100, lw=0, step=stepped)
            names.append(name)
    axis.grid(color=FAINT, lw=0.6)
    axis.set_xlim(datetime.fromtimestamp(span.start), datetime.fromtimestamp(span.end))
    axis.set_ylim(defaults.get("min"), None if names and "max" not in defaults else 1.05 * defaults.get("max", 1))
    if custom.get("thresholdsStyle", {}).get("mode") == "line":
        for step in defaults["thresholds"]["steps"]:
            if step["value"] is not None and step["value"] <= axis.get_ylim()[1]:
                axis.axhline(step["value"], color=NAMED[step["color"]], lw=0.9, ls="--")
    axis.xaxis.set_major_formatter(DateFormatter("%H:%M"))
    is_binary = unit == "bytes" and axis.get_ylim()[1] > 0
    round_ = MultipleLocator(2.0 ** int(math.log2(axis.get_ylim()[1] / 3))) if is_binary else MaxNLocator(5)
    axis.yaxis.set_major_locator(round_)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: quantity(value, unit)))
    axis.tick_params(colors=TEXT, labelsize=7, length=0)
    if names:
        columns = max(1, min(len(names), LEGEND // (max(map(len, names)) + 5)))
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.12), "ncols": columns}
        look = {"frameon": False, "handlelength": 1.2, "columnspacing": 1.2, "labelspacing": 0.2}
        axis.legend(fontsize=7, labelcolor=TEXT, **look, **place)
    else:
        _nothing(axis)


KINDS: Mapping[str, Callable[[Any, Mapping[str, Any], Prometheus, Span], None]] = {"stat": number, "timeseries": lines}


def draw(dashboard: Mapping[str, Any], source: Prometheus, span: Span, caption: str, picture: Path) -> None:
    """Draw a dashboard over a span. Raises KeyError for a kind of panel or a unit that is not known here."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    bottom = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"])
    high = bottom + 4.5  # lines of the grid: a title above, the caption below
    figure = pyplot.figure(figsize=(COLUMNS * UNIT, high * UNIT / 2), facecolor=PAGE)

    def box(x: float, y: float, w: float, h: float) -> Any:
        return figure.add_axes((x / COLUMNS, 1 - (y + h) / high, w / COLUMNS, h / high))

    begin, end = (datetime.fromtimestamp(at) for at in (span.start, span.end))
    figure.text(0.012, 1 - 1.3 / high, dashboard["title"], fontsize=17, color="white", va="center")
    figure.text(0.988, 1 - 1.3 / high, f"{begin:%Y-%m-%d %H:%M} to {end:%H:%M}", fontsize=10, color=TEXT,
                va="center", ha="right")  # fmt: skip
    figure.text(0.5, 1.0 / high, caption, fontsize=8, color=TEXT, va="center", ha="center")
    starts = [
        (NAMED[one["iconColor"]], at)
        for one in dashboard["annotations"]["list"]
        for _, times, _ in source.over(one["expr"], span)
        for at in times
    ]
    for panel in dashboard["panels"]:
        grid = panel["gridPos"]
        x, y, w, h = grid["x"], grid["y"] + 2.5, grid["w"], grid["h"]
        if panel["type"] == "row":
            figure.text(0.012, 1 - (y + 0.55) / high, panel["title"], fontsize=12, color="white", va="center")
            continue
        frame = box(x + 0.12, y + 0.12, w - 0.24, h - 0.24)
        frame.set(xticks=[], yticks=[], facecolor=PANEL)
        frame.set_title(panel["title"], fontsize=9.5, color="white", loc="left", y=1.0, pad=-13, x=0.02)
        is_number = panel["type"] == "stat"
        axis = box(x + 0.3, y + 1.4, w - 0.6, h - 1.8) if is_number else box(x + 1.2, y + 1.5, w - 1.6, h - 3.4)
        axis.set_facecolor(PANEL)
        KINDS[panel["type"]](axis, panel, source, span)
        for colour, at in () if is_number else starts:
            axis.axvline(datetime.fromtimestamp(at), color=colour, lw=0.8, ls=":")
        for spine in (*frame.spines.values(), *axis.spines.values()):
            spine.set(color=FAINT, lw=0.6)
    figure.savefig(picture, dpi=80)
    pyplot.close(figure)
