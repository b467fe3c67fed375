"""All of the capacity model: fit, check, bends, simulations, figure.

    python -m benchmarks.capacity            writes benchmarks/results/capacity-*.json and capacity.png
    python -m benchmarks.capacity fleet      one of them again: validation, replica, bends, gateway, fleet or day

Everything is drawn from fixed seeds, so that the same results give the same files. `python -m benchmarks.tables` then
writes docs/scale.md's tables from them.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from benchmarks.capacity.assumptions import Accelerator, Machine, Model, ObjectStore, Workload
from benchmarks.capacity.bends import DAY, FEED_PERIOD, KEPT, MILLION, WINDOW, Costs, bends
from benchmarks.capacity.day import Course, Day
from benchmarks.capacity.fleet import Fleet, simulated
from benchmarks.capacity.formulas import Protocol, distinct, listing_seconds, zipf
from benchmarks.capacity.gateway import streamed
from benchmarks.capacity.report import draw
from benchmarks.capacity.service import places_that_fit, roofline
from benchmarks.capacity.validate import RESULTS, validated
from steering.mirror import FRESH, LISTABLE

MACHINE, MODEL, WORK, STORE, NODE = Accelerator(), Model(), Workload(), ObjectStore(), Machine()
STEPS = roofline(MACHINE, MODEL)
PLACES, LOAD = 32, 0.6
"""Of a replica: the default of `max_batch`, and how full it is kept."""
PREFIXES = 16
"""Over which the last remedy spreads keys by a hash of the name: a store's limits are per prefix."""


def costs() -> Costs:
    """What was measured on this machine."""
    return Costs.of(json.loads((RESULTS / "capacity-costs.json").read_text(encoding="utf-8")))


def replica() -> dict[str, Any]:
    """What one assumed replica does, by places."""
    rows = [
        {
            "places": places,
            "token_ms": 1e3 * STEPS.life(places, WORK) / WORK.answer,
            "requests_per_second": STEPS.throughput(places, WORK),
            "tokens_per_second": WORK.answer * STEPS.throughput(places, WORK),
            "context_gigabytes": places * (WORK.prompt + WORK.answer) * MODEL.position_bytes / 1e9,
            "program_megabytes": places * WORK.steered * MODEL.program_bytes / 1e6,
        }
        for places in (1, 16, 32, 64, 128, 256)
    ]
    assumed = {type(one).__name__: asdict(one) for one in (MACHINE, MODEL, WORK, STORE, NODE)}
    sizes = {name: getattr(MODEL, name) for name in ("position_bytes", "concept_bytes", "program_bytes")}
    return {
        "kind": "replica",
        "rows": rows,
        "steps": asdict(STEPS),
        "places_that_fit": places_that_fit(MACHINE, MODEL, WORK),
        "assumed": assumed,
        "sizes": sizes,
    }


def where() -> dict[str, Any]:
    """The bends."""
    given = {"places": PLACES, "load": LOAD, "concepts": MILLION, "kept": KEPT, "window": WINDOW, "feed": FEED_PERIOD}
    return {
        "kind": "bends",
        **given,
        "listable": LISTABLE,
        "rows": bends(STEPS, PLACES, LOAD, costs(), WORK, MACHINE, MODEL),
    }


def gateway() -> dict[str, Any]:
    """Streams through one gateway process, as it is and with remedies."""
    cost, step = costs(), STEPS.life(PLACES, WORK) / WORK.answer
    ways = {
        "one": (cost.read_piece + cost.piece, 0.0, (1, 4, 16, 64)),
        "held": (cost.read_piece + cost.piece, WINDOW, (1, 2, 4, 16)),
        "proxy": (cost.proxy_piece, 0.0, (1, 8, 16, 32)),
        "both": (cost.proxy_piece, WINDOW, (16, 64, 96, 128)),
    }
    rows = [
        {"way": way, **streamed(n, PLACES, step, seconds, window=window)}
        for way, (seconds, window, sizes) in ways.items()
        for n in sizes
    ]
    return {"kind": "gateway", "places": PLACES, "step_ms": 1e3 * step, "window_ms": 1e3 * WINDOW, "rows": rows}


def fleet() -> dict[str, Any]:
    """Thousands of replicas over one store."""
    rate = LOAD * STEPS.throughput(PLACES, WORK) * WORK.steered
    cost = costs()

    def held(concepts: int) -> int:
        return max(min(math.ceil(distinct(zipf(concepts, WORK.zipf), rate * DAY)), concepts), 1)

    def as_is(replicas: int, concepts: int) -> Fleet:
        n = held(concepts)
        own = {"ask_seconds": cost.asking(n), "miss_seconds": cost.missing(n)}
        protocol: Protocol = "listing" if concepts <= LISTABLE else "name"
        return Fleet(replicas=replicas, concepts=concepts, protocol=protocol, cache=n, **own)

    def remedied(replicas: int, concepts: int, dies: float = 0.0) -> Fleet:
        own = {"ask_seconds": cost.asking(0), "miss_seconds": cost.missing(0), "dies": dies}
        n = held(concepts)
        return Fleet(replicas=replicas, concepts=concepts, protocol="feed", period=FEED_PERIOD, cache=n, **own)

    spread = replace(STORE, reads_per_second=PREFIXES * STORE.reads_per_second)
    plain = [
        *(as_is(replicas, LISTABLE) for replicas in (500, 2000, 4000)),
        as_is(500, 10_000),
        *(as_is(replicas, MILLION) for replicas in (500, 1000, 2000)),
    ]
    better = [
        *((remedied(replicas, MILLION), STORE, 1) for replicas in (2000, 4000)),
        (remedied(4000, 10 * MILLION), STORE, 1),
        (remedied(4000, 10 * MILLION, 0.05), spread, PREFIXES),
    ]
    rows = []
    for one, store, prefixes in [*((one, STORE, 1) for one in plain), *better]:
        rows.append({"prefixes": prefixes, **asdict(one), **simulated(one, STEPS, MODEL, WORK, store)})
        print(rows[-1], flush=True)
    return {"kind": "fleet", "period": FRESH, "limits": asdict(STORE), "rows": rows}


def day() -> dict[str, Any]:
    """A day of a fleet with an autoscaler."""
    peak = 20_000.0
    listing = listing_seconds(MILLION, STORE)
    needed = math.ceil(1.4 * peak / (STEPS.throughput(PLACES, WORK) * 0.7))
    boot = NODE.boot + NODE.load
    ways = {
        "as is": Day(peak=peak, start=boot + listing),
        "no listing": Day(peak=peak, start=boot),
        "capped": Day(peak=peak, start=boot, most=needed),
        "headroom": Day(peak=peak, start=boot, most=needed, target=0.5),
        "warm pool": Day(peak=peak, start=NODE.load, most=needed),
    }
    rows = []
    for way, one in ways.items():
        rows.append({"way": way, **asdict(one), **Course(one, STEPS, WORK).run()})
        print({name: value for name, value in rows[-1].items() if name != "track"}, flush=True)
    return {"kind": "day", "rows": rows}


PARTS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "validation": validated,
    "replica": replica,
    "bends": where,
    "gateway": gateway,
    "fleet": fleet,
    "day": day,
}


def main() -> None:
    """Run what is asked for, write it, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all without one")
    given = parser.parse_args()
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    for name in given.parts or PARTS:
        body = PARTS[name]()
        (RESULTS / f"capacity-{name}.json").write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
        print(f"{name}: written", flush=True)
    print(draw(RESULTS))


if __name__ == "__main__":
    main()
