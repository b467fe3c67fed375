"""The tables and the figure of docs/scale.md, from `benchmarks/results/capacity-*.json`.

`benchmarks.tables` writes the tables, one renderer for each kind of result; `python -m benchmarks.capacity` draws.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Body = Mapping[str, Any]
Table = tuple[Sequence[str], Sequence[Sequence[str]], str]
"""Header, rows, and what is said below."""
PICTURE = "capacity.png"


def _number(value: float | None) -> str:
    """Three digits that mean something, thousands told apart by a narrow space."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    digits = f"{value:.3g}"
    return f"{float(digits):,.0f}".replace(",", " ") if abs(value) >= 100 else f"{float(digits):g}"


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= factor:
            return f"{_number(seconds / factor)} {unit}"
    return f"{_number(seconds * 1e9)} ns"


def costs(body: Body) -> Table:
    """What was measured of the store and of a stream's pieces."""
    concept, store, copies = body["concept"], body["store"]["rows"], body["mirror"]["rows"]
    rows = [
        ["a piece of a stream, passed on by a Python process", _time(body["forward"]["piece_seconds"])],
        ["the same through HAProxy", _time(body["proxy"]["piece_seconds"])] if body["proxy"] else None,
        ["a piece through a Ray Serve handle, in the gateway", _time(body["handle"]["read_seconds"])]
        if body["handle"]
        else None,
        ["the same, in the replica", _time(body["handle"]["yield_seconds"])] if body["handle"] else None,
        ["a concept of the 8B shape, read and checked", _time(concept["load_seconds"])],
        ["the same, from the shelf", _time(concept["hit_seconds"])],
        ["a program of `lqr` on it, compiled", _time(concept["compile_seconds"])],
        ["its slot, prepared", _time(concept["prepare_seconds"])],
        *(
            [f"a request that names a concept that there is not, beside {_number(row['artifacts'])} artifacts",
             f"{_time(row['unknown_seconds'])}, an error of {_number(row['unknown_characters'])} characters"]
            for row in store
        ),
        *(
            [f"the mirror with {_number(row['held'])} copies: one compared; one more copied",
             f"{_time(row['ask_seconds'])}; {_time(row['miss_seconds'])}"]
            for row in copies
        ),
        ["the mirror: one key of a listing", _time(copies[-1]["listing_seconds_each"])],
    ]  # fmt: skip
    ray = f", Ray {body['handle']['ray']}" if body["handle"] else ""
    note = (
        f"CPU time on one core, medians of {body['repeats']}, the concept's of {concept['repeats']}; measured at "
        f"different times on a shared machine; {body['processor']}, Python {body['python']}{ray}. "
        f"On disk such a concept has {_number(concept['file_bytes'])} bytes, its resident program "
        f"{_number(concept['program_bytes'])}. The mirror's place was a folder, so that no network counts."
    )
    return ("what", "CPU time"), [row for row in rows if row], note


def validation(body: Body) -> Table:
    """Measured and simulated latencies side by side."""
    names = [f"{n}_{p}_ms" for n in ("ttft", "itl", "e2e") for p in ("p50", "p99")]
    header = ("arrivals/s", "", *(f"{name[:-7].upper()} {name[-6:-3]}" for name in names))
    rows = []
    for row in body["rows"]:
        label = f"{row['rate']:g}" + (", ten minutes" if row["seconds"] > 300 else "")
        told = "measured, medians fitted" if row["is_fitted"] else "measured"
        rows.append([label, told, *(f"{row['measured'][name]:.1f}" for name in names)])
        rows.append(["", "simulated", *(f"{row['simulated'][name]:.1f}" for name in names)])
    steps = body["steps"]
    note = (
        f"Milliseconds. A step takes {_time(steps['fixed'])}, {_time(steps['per_sequence'])} more for each request "
        f"that decodes and {_time(steps['per_prompt_token'])} for each token of a prompt; {_time(body['ahead'])} pass "
        f"before a request is queued; {body['places']} places."
    )
    return header, rows, note


def replica(body: Body) -> Table:
    """One assumed replica, by places."""
    header = ("places", "ms a token", "requests/s", "tok/s", "keys and values, GB", "programs resident, MB")
    names = (
        "places", "token_ms", "requests_per_second", "tokens_per_second", "context_gigabytes", "program_megabytes",
    )  # fmt: skip
    rows = [[_number(row[name]) for name in names] for row in body["rows"]]
    work, sizes = body["assumed"]["Workload"], body["sizes"]
    note = (
        f"Prompts of {work['prompt']} tokens, of which {work['cached']:.0%} are found in the prefix cache, answers of "
        f"{work['answer']}; {work['steered']:.0%} of the requests are steered. A position takes "
        f"{_number(sizes['position_bytes'])} bytes, a program {_number(sizes['program_bytes'])}, a concept "
        f"{_number(sizes['concept_bytes'])}. There is memory for {_number(body['places_that_fit'])} places."
    )
    return header, rows, note


PARTS: Mapping[str, tuple[str, str, str]] = {
    "gateway": (
        "8B replicas whose tokens one gateway process passes on, a piece a token",
        "of one core",
        "a proxy written in C passes on what replicas send, and they hold a stream's tokens for a moment",
    ),
    "handle": ("cores that a replica spends on yielding pieces to the gateway", "of one process", "the same"),
    "unknown": (
        "seconds that a request with a misspelt concept costs, after a day",
        "s of CPU",
        "names kept in memory, not looked up in the folder",
    ),
    "index": (
        "cores that a replica spends on comparing, copying and loading after a day, beside a million concepts",
        "of one process",
        "an index that is appended to, a cache that forgets, a feed of changes",
    ),
    "names": ("replicas that may compare name by name, beside a million concepts", "replicas", "a feed of changes"),
    "listing": ("replicas that may compare by listing, with few concepts", "replicas", "a feed of changes"),
    "first listing": ("seconds of a start spent on the first listing, beside a million", "s", "none is needed"),
    "starts": ("replicas that may start together before that listing is given up", "replicas", "no listing, no bend"),
    "listing given up": ("concepts at which that listing takes longer than is waited for", "", "no listing, no bend"),
    "disk": ("days until the mirror of a replica has filled its disk", "days", "a mirror that forgets"),
    "compile": ("cores that compiling programs takes", "of one process", "compiled programs kept by what they say"),
    "fits": ("days until one writer has fitted a million concepts", "days", "a hundred writers, jobs named by content"),
    "slots": ("places at which distinct programs fill the slots", "places", "not needed"),
    "context": ("places at which keys and values fill the memory", "places", "not needed"),
}
"""By part: what is counted, its unit, and the remedy."""


def bends(body: Body) -> Table:
    """Where each part stops following."""
    header = ("what", "as it is", "remedy", "with it")
    rows = [
        [PARTS[row["part"]][0], _number(row["as_is"]), PARTS[row["part"]][2], _number(row["remedied"])]
        for row in body["rows"]
    ]
    note = (
        f"A replica of {body['places']} places at {body['load']:.0%} of what it can do; a million concepts by Zipf's "
        f"law where nothing else is said, few are {body['listable']}. With the remedies tokens are held for "
        f"{_time(body['window'])}, a change is noticed within {_time(body['feed'])}, and a replica keeps "
        f"{_number(body['kept'])} concepts in memory."
    )
    return header, rows, note


WAYS = {
    "one": "Ray Serve's handle, a piece a token",
    "held": "the same, tokens held",
    "proxy": "HAProxy, a piece a token",
    "both": "the same, tokens held",
}


def gateway(body: Body) -> Table:
    """Streams through one gateway process."""
    header = ("through one core", "replicas", "tok/s", "busy", "gap p50", "gap p99", "delay p99")
    rows = [
        [
            WAYS[row["way"]],
            _number(row["replicas"]),
            _number(row["tokens_per_second"]),
            f"{min(row['busy'], 1.0):.2f}",
            *(f"{row[name]:.1f}" for name in ("gap_p50_ms", "gap_p99_ms", "delay_p99_ms")),
        ]
        for row in body["rows"]
    ]
    note = (
        "Milliseconds between two pieces of a stream, and from a token to its piece. Each replica runs "
        f"{body['places']} streams of a token every {body['step_ms']:.1f} ms; held: {body['window_ms']:.0f} ms."
    )
    return header, rows, note


def fleet(body: Body) -> Table:
    """Thousands of replicas over one store."""
    header = (
        "replicas", "concepts", "noticing by", "requests/s", "found", "concept p50", "concept p99", "TTFT steered p99",
        "LIST/s", "GET, HEAD/s", "GB/s", "store behind", "broken",
    )  # fmt: skip
    rows = []
    for row in body["rows"]:
        died = f", {row['dies']:.0%} fail" if row["dies"] else ""
        rows.append(
            [
                _number(row["replicas"]) + died,
                _number(row["concepts"]) + (f", {row['prefixes']} prefixes" if row["prefixes"] > 1 else ""),
                row["protocol"],
                _number(row["requests_per_second"]),
                f"{row['hit_rate']:.2f}",
                *(_number(row.get(name)) for name in ("concept_p50_ms", "concept_p99_ms", "ttft_steered_p99_ms")),
                *(_number(row[name]) for name in ("lists_per_second", "reads_per_second", "gigabytes_per_second")),
                _time(behind) if (behind := max(row["store_behind_seconds"], 0.0)) > 0.1 else "no",
                _number(row["broken"]),
            ]
        )
    limits = body["limits"]
    note = (
        "Milliseconds. `listing` and `name` are the mirror as it is, `feed` is the remedy, all a day after the start. "
        f"`store behind` is the store's queue at the end, of {_number(limits['reads_per_second'])} reads and "
        f"{_number(limits['lists_per_second'])} listings a second: where it is not empty it grows as long as this "
        "lasts, and the latencies are those of its first seconds, TTFT of those that were admitted "
        "within them. `broken`: answers cut off by replicas that failed."
    )
    return header, rows, note


COURSES = {
    "as is": "as it is: the first listing at every start",
    "no listing": "without that listing",
    "capped": "so, and with a most for the autoscaler",
    "headroom": "so, and half of the places aimed at",
    "warm pool": "in place of that, machines kept that have booted",
}


def day(body: Body) -> Table:
    """A day of a fleet."""
    header = (
        "fleet",
        "start",
        "refused",
        "wait p99",
        "longest wait",
        "most replicas",
        "replica hours",
        "broken answers",
    )
    rows = [
        [
            COURSES[row["way"]],
            _time(row["start"]),
            f"{row['refused_share']:.2%}",
            f"{row['wait_p99_seconds']:.1f}",
            f"{row['wait_most_seconds']:.1f}",
            _number(row["most_replicas"]),
            _number(row["replica_hours"]),
            _number(row["broken"]),
        ]
        for row in body["rows"]
    ]
    one = body["rows"][0]
    note = (
        f"Seconds. {_number(one['requests'])} requests: a tide between {one['ebb']:.0%} and 100% of "
        f"{_number(one['peak'])} a second, and a rush of {one['rush']:.0%} more that rises within "
        f"{_time(one['rush_rises'])} and lasts {_time(one['rush_lasts'])}; {_number(one['failures'])} replicas fail in "
        "the first row, one after another."
    )
    return header, rows, note


KINDS: Mapping[str, Callable[[Body], Table]] = {
    "costs": costs,
    "validation": validation,
    "replica": replica,
    "bends": bends,
    "gateway": gateway,
    "fleet": fleet,
    "day": day,
}


def draw(results: Path) -> Path:
    """The figure: measured beside simulated, one gateway, the store, the day. Raises ImportError without matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    panels = {"validation": _check, "gateway": _pieces, "fleet": _asked, "day": _course}
    found = {name: results / f"capacity-{name}.json" for name in panels}
    found = {name: path for name, path in found.items() if path.exists()}
    if not found:
        raise FileNotFoundError(f"no results in {results}: run python -m benchmarks.capacity")
    figure, axes = pyplot.subplots(1, len(found), figsize=(4.6 * len(found), 3.6), squeeze=False)
    for axis, (name, path) in zip(axes.flat, found.items(), strict=True):
        panels[name](axis, json.loads(path.read_text(encoding="utf-8")))
        axis.title.set_size(9)
        axis.legend(fontsize=6)
    figure.tight_layout()
    picture = results / PICTURE
    figure.savefig(picture, dpi=140)
    pyplot.close(figure)
    return picture


def _check(axis: Any, body: Body) -> None:
    rows = [row for row in body["rows"] if row["seconds"] < 300]
    rates = [row["rate"] for row in rows]
    for name, colour in (("ttft", "#d9534f"), ("itl", "#5b8def"), ("e2e", "#9aa5b1")):
        for share, weight in (("p50", 0.9), ("p99", 1.8)):
            key = f"{name}_{share}_ms"
            axis.plot(rates, [row["simulated"][key] for row in rows], "-", color=colour, lw=weight)
            label = f"{name} {share}"
            axis.plot(rates, [row["measured"][key] for row in rows], "o", color=colour, ms=3 * weight, label=label)
    axis.set(title="measured (points), simulated (lines)", xlabel="arrivals a second", ylabel="ms")
    axis.set(xscale="log", yscale="log", ylim=(2, 3e4))


def _pieces(axis: Any, body: Body) -> None:
    for way, colour in zip(WAYS, ("#d9534f", "#e8a33d", "#5b8def", "#5cb85c"), strict=True):
        rows = [row for row in body["rows"] if row["way"] == way]
        label = f"{'Ray handle' if way in ('one', 'held') else 'HAProxy'}{', held' if way in ('held', 'both') else ''}"
        axis.plot([r["replicas"] for r in rows], [r["gap_p99_ms"] for r in rows], "o-", color=colour, ms=3, label=label)
    axis.set(title="gap between pieces, p99", xlabel="8B replicas behind one core", ylabel="ms")
    axis.set(xscale="log", yscale="log")


def _asked(axis: Any, body: Body) -> None:
    for protocol, colour in (("listing", "#9aa5b1"), ("name", "#d9534f"), ("feed", "#5cb85c")):
        rows = [row for row in body["rows"] if row["protocol"] == protocol and not row["dies"]]
        x, y = [row["replicas"] for row in rows], [row["concept_p99_ms"] for row in rows]
        axis.plot(x, y, "o", color=colour, ms=5, label=f"by {protocol}")
        for row, at, value in zip(rows, x, y, strict=True):
            axis.annotate(f"{row['concepts']:g}", (at, value), fontsize=6, xytext=(3, 3), textcoords="offset points")
    axis.set(title="until a concept is there, p99 (how many there are)", xlabel="replicas", ylabel="ms", yscale="log")


def _course(axis: Any, body: Body) -> None:
    rows = {row["way"]: row for row in body["rows"]}
    for way, colour in (("as is", "#d9534f"), ("capped", "#e8a33d"), ("warm pool", "#5cb85c")):
        hours = [one[0] / 3600 for one in rows[way]["track"]]
        axis.plot(hours, [one[2] for one in rows[way]["track"]], color=colour, lw=1.2, label=f"replicas, {way}")
    axis.set(title="a day with a rush", xlabel="hour", ylabel="replicas", yscale="log")
