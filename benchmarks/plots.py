"""The figure of docs/performance.md, from the results: peers, latency under load, distinct programs.

    python -m benchmarks.plots [--name cpu]

Reads benchmarks/results/{peers,load,engine}-NAME.json; one that is missing leaves its panel out. Writes
benchmarks/results/performance-NAME.png. Needs matplotlib (`pip install setpoint[plot]`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
COLOURS = {"none": "#9aa5b1", "add": "#5b8def", "lqr": "#d9534f"}


def peers(axis: Any, body: Mapping[str, Any]) -> None:
    """Bars: throughput ÷ that of unsteered `generate`, at the largest batch."""
    batch = max(row["batch"] for row in body["rows"])
    rows = [row for row in body["rows"] if row["batch"] == batch and row.get("to_generate")][::-1]
    ratios = [row["to_generate"] for row in rows]
    medians = [ratio["median"] for ratio in ratios]
    spread = [[r["median"] - r["least"] for r in ratios], [r["most"] - r["median"] for r in ratios]]
    axis.barh(
        [f"{row['system']} {row['mode']}" for row in rows],
        medians,
        xerr=spread,
        color=[COLOURS[row["mode"]] for row in rows],
        error_kw={"lw": 0.8, "capsize": 2},
    )
    axis.axvline(1.0, color="black", lw=0.6)
    axis.set(title=f"throughput, batch {batch}", xlabel="tok/s ÷ unsteered generate, median and range")
    axis.tick_params(axis="y", labelsize=7)


def load(axis: Any, body: Mapping[str, Any]) -> None:
    """Lines: time to first token and inter-token latency over the rate of arrivals, medians and 99th percentiles."""
    for side, style in (("unsteered", "--"), ("steered", "-")):
        for name, colour in (("ttft", "#d9534f"), ("itl", "#5b8def")):
            for share, weight in (("p50", 0.9), ("p99", 1.8)):
                key = f"{name}_{share}_ms"
                rows = [row for row in body["rows"] if key in row[side]]
                rates, values = [row["rate"] for row in rows], [row[side][key] for row in rows]
                axis.plot(rates, values, style, color=colour, lw=weight, label=f"{name} {share}, {side}")
    axis.set(title="latency under load", xlabel="arrivals a second", ylabel="milliseconds", xscale="log", yscale="log")
    axis.legend(fontsize=6)


def engine(axis: Any, body: Mapping[str, Any]) -> None:
    """Points: steered ÷ unsteered throughput over distinct programs of one batch's requests."""
    rows = [row for row in body["rows"] if row["interventions"] == 1]
    x = [row["programs"] for row in rows]
    low = [row["ratio"] - row["least"] for row in rows]
    high = [row["most"] - row["ratio"] for row in rows]
    axis.errorbar(x, [row["ratio"] for row in rows], yerr=[low, high], marker="o", ms=4, lw=1, capsize=2)
    axis.axhline(1.0, color="black", lw=0.6)
    axis.set(title="steering's cost", xlabel="distinct programs", ylabel="steered ÷ unsteered, median and range")
    axis.set_xscale("log", base=2)
    axis.set_ylim(bottom=0)


PANELS = {"peers": peers, "load": load, "engine": engine}


def draw(results: Path, name: str) -> Path:
    """Draw what has been measured. Raises FileNotFoundError when nothing has, ImportError without matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    found = {kind: results / f"{kind}-{name}.json" for kind in PANELS if (results / f"{kind}-{name}.json").exists()}
    if not found:
        raise FileNotFoundError(f"no results of {name!r} in {results}: run the benchmarks first")
    figure, axes = pyplot.subplots(1, len(found), figsize=(4.6 * len(found), 3.6), squeeze=False)
    for axis, (kind, path) in zip(axes.flat, found.items(), strict=True):
        PANELS[kind](axis, json.loads(path.read_text()))
        axis.title.set_size(9)
        axis.xaxis.label.set_size(8)
        axis.yaxis.label.set_size(8)
    figure.tight_layout()
    picture = results / f"performance-{name}.png"
    figure.savefig(picture, dpi=140)
    pyplot.close(figure)
    return picture


def main() -> None:
    """Draw and tell where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="cpu")
    print(draw(RESULTS, parser.parse_args().name))


if __name__ == "__main__":
    main()
