"""Where each part stops following: the size at which it does, as the code is and with a remedy, in closed form.

Costs are those that `capacity-costs.json` holds, of one core of this machine; the replica is the assumed one. One row a
part, of numbers only: what they mean and what the remedy is says `benchmarks.capacity.report`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.capacity.assumptions import Accelerator, Machine, Model, ObjectStore, Workload
from benchmarks.capacity.formulas import (
    characteristic_time,
    checks_per_second,
    distinct,
    hit_rate,
    listing_seconds,
    pages,
    zipf,
)
from benchmarks.capacity.service import Steps, places_that_fit
from steering.mirror import FIRST, FRESH, LISTABLE
from steering.store import KEPT as SHELF

MILLION = 10**6
DAY = 86400.0
KEPT = 20_000
"""Concepts that a replica keeps in memory, with the remedy; its disk keeps what it has copied."""
FEED_PERIOD = 4.0
"""Seconds within which a replica learns of a change, with the remedy."""
WINDOW = 0.05
"""Seconds for which tokens of one stream are held and sent together, with the remedy."""


@dataclass(frozen=True)
class Costs:
    """CPU seconds, from `benchmarks.capacity.costs`."""

    piece: float
    proxy_piece: float
    read_piece: float
    yield_piece: float
    load: float
    compile: float
    ask: tuple[float, float]
    miss: tuple[float, float]
    unknown: tuple[float, float]
    """Of one comparison, of one copy, and of a name that there is not: the fixed part, and that of each copy which is
    held."""

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Costs:
        """From the results."""
        rows = body["mirror"]["rows"]
        return cls(
            body["forward"]["piece_seconds"],
            body["proxy"]["piece_seconds"],
            body["handle"]["read_seconds"],
            body["handle"]["yield_seconds"],
            body["concept"]["load_seconds"],
            body["concept"]["compile_seconds"],
            _line(rows, "ask_seconds"),
            _line(rows, "miss_seconds"),
            _line([row | {"held": row["artifacts"]} for row in body["store"]["rows"]], "unknown_seconds"),
        )

    def asking(self, held: float) -> float:
        """A comparison, with so many copies held."""
        return self.ask[0] + self.ask[1] * held

    def missing(self, held: float) -> float:
        """A copy of a concept, with so many copies held."""
        return self.miss[0] + self.miss[1] * held

    def misspelling(self, held: float) -> float:
        """The error of a name that there is not, with so many copies held."""
        return self.unknown[0] + self.unknown[1] * held


def _line(rows: list[Mapping[str, float]], name: str) -> tuple[float, float]:
    """A line through the first and the last size: what does not grow, at least 0, and what each copy adds."""
    low, high = rows[0], rows[-1]
    each = max((high[name] - low[name]) / (high["held"] - low["held"]), 0.0)
    return max(low[name] - each * low["held"], 0.0), each


def bends(
    steps: Steps, places: int, load: float, costs: Costs, work: Workload, machine: Accelerator, model: Model
) -> list[dict[str, Any]]:
    """One row a part."""
    store, node = ObjectStore(), Machine()
    served = steps.throughput(places, work)
    tokens = served * work.answer
    pieces = min(places / WINDOW, tokens)
    steered = load * served * work.steered
    few, many = zipf(LISTABLE, work.zipf), zipf(MILLION, work.zipf)
    held = distinct(many, steered * DAY)
    found = hit_rate(many, steered, DAY)
    kept, shelved = (hit_rate(many, steered, characteristic_time(many, steered, count)) for count in (KEPT, SHELF))
    lists = checks_per_second("listing", 1, few, steered, FRESH, store)
    asks = checks_per_second("name", 1, many, steered, FRESH, store) + steered * (1 - found)
    feeds = checks_per_second("feed", 1, many, steered, FEED_PERIOD, store) + steered * (1 - found)
    index = asks * costs.asking(held) + steered * ((1 - found) * costs.missing(held) + (1 - shelved) * costs.load)
    index_kept = feeds * costs.asking(0) + steered * ((1 - found) * costs.miss[0] + (1 - kept) * costs.load)

    def row(part: str, as_is: float | None, remedied: float | None) -> dict[str, Any]:
        return {"part": part, "as_is": as_is, "remedied": remedied}

    return [
        row("gateway", 1 / (costs.read_piece + costs.piece) / tokens, 1 / costs.proxy_piece / pieces),
        row("handle", tokens * costs.yield_piece, pieces * costs.yield_piece),
        row("unknown", costs.misspelling(held), costs.misspelling(0)),
        row("index", index, index_kept),
        row("names", store.reads_per_second / asks, store.reads_per_second / feeds),
        row("listing", store.lists_per_second / lists, store.reads_per_second / feeds),
        row("first listing", listing_seconds(MILLION, store), 0.0),
        row("starts", FIRST * store.lists_per_second / pages(MILLION, store), None),
        row("listing given up", FIRST / listing_seconds(MILLION, store) * MILLION, None),
        row("disk", _days(many, steered, node.disk / model.concept_bytes), None),
        row("compile", load * served * work.steered * costs.compile, None),
        row("fits", MILLION * node.fit_seconds / DAY, MILLION * node.fit_seconds / DAY / 100),
        row("slots", model.program_slots / work.steered, None),
        row("context", places_that_fit(machine, model, work), None),
    ]


def _days(popularity: Any, rate: float, concepts: float) -> float | None:
    """Until so many distinct concepts have been asked for at one replica; None when there are not so many."""
    if concepts >= popularity.concepts:
        return None
    time = characteristic_time(popularity, rate, math.floor(concepts))
    return time / DAY
