"""A day of a fleet that grows and shrinks, in SimPy: the tide of arrivals, a rush, an autoscaler, starts and failures.

Requests are a fluid here and replicas are not: in every tick so many arrive and so many leave, by the throughput of a
replica at the number that run on it, while each replica starts, fails and stops as an event of its own. The autoscaler
is Ray Serve's: it wants as many replicas as hold the ongoing requests at `target` of their places, grows when that has
been so for `up_after` seconds and shrinks after `down_after`.

Oracle: without tide, rush and failures the fleet settles at arrivals / throughput(target) replicas (tests).
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy

from benchmarks.capacity.assumptions import Workload
from benchmarks.capacity.service import Steps

TICK = 1.0
"""Seconds; an answer takes longer, or the fluid would leave before it has come."""
TRACKED = 600
"""Ticks between two points of the figure."""
LOOK = 5.0
"""Seconds between two looks of the autoscaler."""
DAY = 86400.0


@dataclass(frozen=True, kw_only=True)
class Day:
    """A scenario."""

    peak: float
    """Requests a second when the tide is highest."""
    start: float
    """Seconds from wanting a replica to having it."""
    target: float = 0.7
    """Share of its places that the autoscaler lets a replica use."""
    ebb: float = 0.3
    """The lowest tide, as a share of the highest."""
    rush: float = 0.4
    """What comes on top for `rush_lasts` seconds, as a share of the peak; it rises within `rush_rises`."""
    rush_at: float = 0.8 * DAY
    rush_rises: float = 120.0
    rush_lasts: float = 1200.0
    places: int = 32
    queue_limit: int = 256
    most: int | None = None
    """Most replicas that the autoscaler may want."""
    up_after: float = 30.0
    down_after: float = 600.0
    mean_life: float = 30 * DAY
    seed: int = 0


class Course:
    """A scenario, run once."""

    def __init__(self, day: Day, steps: Steps, work: Workload) -> None:
        self.day, self.steps, self.work = day, steps, work
        self.env = simpy.Environment()
        self.rng = np.random.default_rng(day.seed)
        self.life = [steps.life(max(n, 1), work) for n in range(day.places + 1)]
        self.ongoing = 0.0
        self.ready = self._wanted_at(self.arrivals(0.0))
        self.starting = 0
        self.arrived = self.refused = self.broken = self.hours = 0.0
        self.waits: list[tuple[float, float]] = []
        self.track: list[tuple[float, float, int, float]] = []
        self.failures = 0

    def arrivals(self, now: float) -> float:
        """Requests a second."""
        day = self.day
        tide = (1 + day.ebb) / 2 - (1 - day.ebb) / 2 * math.cos(2 * math.pi * now / DAY - 0.4 * math.pi)
        since = now - day.rush_at
        rush = min(since / day.rush_rises, 1.0) if 0 <= since < day.rush_lasts else 0.0
        return day.peak * (tide + day.rush * rush)

    def _wanted_at(self, rate: float) -> int:
        n = self.day.target * self.day.places
        return max(math.ceil(rate * self._life(n) / n), 1)

    def _life(self, running: float) -> float:
        """Seconds that an answer takes at a fractional number of running requests."""
        low = min(int(running), self.day.places - 1)
        return self.life[low] + (running - low) * (self.life[low + 1] - self.life[low])

    def run(self, lasts: float = DAY) -> dict[str, Any]:
        """The day's figures."""
        self.ongoing = self.ready * self.day.target * self.day.places
        for process in (self._flow, self._scale, self._fail):
            self.env.process(process())
        self.env.run(until=lasts)
        waits, weights = (np.array(part) for part in zip(*sorted(self.waits), strict=True))
        share = np.cumsum(weights) / weights.sum()
        return {
            "requests": round(self.arrived),
            "refused_share": self.refused / self.arrived,
            "broken": round(self.broken),
            "failures": self.failures,
            "wait_p99_seconds": float(waits[int(np.searchsorted(share, 0.99))]),
            "wait_most_seconds": float(waits[-1]),
            "replica_hours": round(self.hours),
            "most_replicas": max(row[2] for row in self.track),
            "track": [
                [round(at), round(rate, 1), ready, round(wait, 2)] for at, rate, ready, wait in self.track[::TRACKED]
            ],
        }

    def _flow(self) -> Generator[simpy.Event, Any, None]:
        """Requests come and go."""
        while True:
            day, rate = self.day, self.arrivals(self.env.now)
            came = float(self.rng.poisson(rate * TICK))
            running = min(self.ongoing / max(self.ready, 1), float(day.places))
            left = min(self.ready * running / self._life(running) * TICK, self.ongoing)
            self.ongoing += came - left
            room = self.ready * (day.places + day.queue_limit)
            over = max(self.ongoing - room, 0.0)
            self.ongoing -= over
            waiting = max(self.ongoing - self.ready * day.places, 0.0)
            wait = waiting * self.life[-1] / max(self.ready * day.places, 1)
            self.arrived, self.refused = self.arrived + came, self.refused + over
            self.hours += self.ready * TICK / 3600
            self.waits.append((wait, came))
            self.track.append((self.env.now, rate, self.ready, wait))
            yield self.env.timeout(TICK)

    def _scale(self) -> Generator[simpy.Event, Any, None]:
        """The autoscaler."""
        above = below = 0.0
        while True:
            yield self.env.timeout(LOOK)
            wanted = max(math.ceil(self.ongoing / (self.day.target * self.day.places)), 1)
            wanted = min(wanted, self.day.most or wanted)
            have = self.ready + self.starting
            above = above + LOOK if wanted > have else 0.0
            below = below + LOOK if wanted < self.ready else 0.0
            if above >= self.day.up_after:
                for _ in range(wanted - have):
                    self.starting += 1
                    self.env.process(self._start())
                above = 0.0
            elif below >= self.day.down_after:
                self.ready, below = max(wanted, 1), 0.0

    def _start(self) -> Generator[simpy.Event, Any, None]:
        yield self.env.timeout(self.day.start)
        self.starting -= 1
        self.ready += 1

    def _fail(self) -> Generator[simpy.Event, Any, None]:
        """One replica fails after another."""
        while True:
            yield self.env.timeout(float(self.rng.exponential(self.day.mean_life / max(self.ready, 1))))
            running = min(self.ongoing / max(self.ready, 1), float(self.day.places))
            self.ready, self.failures = max(self.ready - 1, 1), self.failures + 1
            self.broken, self.ongoing = self.broken + running, max(self.ongoing - running, 0.0)
