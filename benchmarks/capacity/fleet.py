"""Thousands of replicas over one store, request by request, in SimPy.

A request comes to the fleet (Poisson), goes to the less busy of two replicas drawn at random, as Ray Serve's router
does, gets its concept if it names one, waits for a place, and holds it for `Steps.life` at the number of requests that
run when it is admitted (the step-by-step replica is `benchmarks.capacity.replica`; a test holds one against the other).

The store is three queues, one for what it lists, one for what it reads and one for its bytes, each served at a rate: a
store that is asked too much is one whose queue grows. A real one answers 503 instead, and the wait is the client's own.

A replica's cache is Che's approximation of one that forgets the least recently used: what it holds is what was asked
for within a characteristic time. When a run begins nobody has asked for anything yet, so when a replica was last asked
for a concept is drawn, at its first request, from the exponential distribution that it has once the replica is warm. A
replica that has just started holds nothing.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simpy

from benchmarks.capacity.assumptions import Model, ObjectStore, Workload
from benchmarks.capacity.formulas import Protocol, characteristic_time, listing_seconds, pages, zipf
from benchmarks.capacity.service import Steps
from steering.mirror import AHEAD, FRESH

DRAWN = 65536
"""Random numbers drawn at once."""
WHOLE_STORE = -1
"""What is compared in one listing, or by one feed."""


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """A scenario."""

    replicas: int
    concepts: int
    protocol: Protocol
    period: float = FRESH
    """Seconds for which a comparison with the store holds. After AHEAD of them the next one goes on beside requests;
    after all of them a request waits for it."""
    cache: int = 20_000
    """Concepts that a replica keeps."""
    ask_seconds: float = 0.0
    miss_seconds: float = 0.0
    """A replica's own work on a comparison and on a copy, which it does before the request goes on."""
    load: float = 0.6
    """Arrivals, as a share of what all replicas can serve."""
    places: int = 32
    queue_limit: int = 256
    warm_up: float = 2.5
    seconds: float = 2.5
    dies: float = 0.0
    """Share of the replicas that fail together, when a third of the measured time has gone by."""
    restart: float = 0.5
    """Seconds until those are back, with nothing in their caches. Short, so that it falls into the measured time."""
    seed: int = 0


@dataclass(slots=True)
class Queue:
    """Work that is served at a rate, one after another; the time of its end is known when it comes."""

    rate: float
    busy_until: float = 0.0
    taken: float = 0.0

    def finish(self, now: float, work: float) -> float:
        """When the work that comes now is done."""
        self.busy_until = max(self.busy_until, now) + work / self.rate
        self.taken += work
        return self.busy_until


@dataclass(slots=True, eq=False)
class Call:
    """A request on its way."""

    at: float
    concept: int
    answer: float
    replica: int = 0
    ready: float = 0.0
    """When its concept was there."""


@dataclass(eq=False)
class Node:
    """A replica: who runs and waits, what it knows."""

    index: int
    born: float = -math.inf
    is_up: bool = True
    life: int = 0
    running: dict[int, tuple[Call, float]] = field(default_factory=dict)
    waiting: deque[Call] = field(default_factory=deque)
    asked: dict[int, float] = field(default_factory=dict)
    compared: dict[int, float] = field(default_factory=dict)
    fetching: dict[int, float] = field(default_factory=dict)

    @property
    def ongoing(self) -> int:
        """Those that run and wait."""
        return len(self.running) + len(self.waiting)


class Simulation:
    """A scenario, run once."""

    def __init__(self, fleet: Fleet, steps: Steps, model: Model, work: Workload, store: ObjectStore) -> None:
        self.fleet, self.steps, self.model, self.work, self.limits = fleet, steps, model, work, store
        self.env = simpy.Environment()
        self.rng = np.random.default_rng(fleet.seed)
        self.popularity = zipf(fleet.concepts, work.zipf)
        self.rate = fleet.load * fleet.replicas * steps.throughput(fleet.places, work)
        self.steered_rate = self.rate * work.steered / fleet.replicas
        self.rates = (self.steered_rate * self.popularity.each_B).tolist()
        self.firsts = self.popularity.first_B.tolist()
        self.draws = random.Random(fleet.seed)
        self.kept = characteristic_time(self.popularity, self.steered_rate, fleet.cache)
        self.nodes = [Node(index) for index in range(fleet.replicas)]
        self.lists, self.reads, self.bytes = (
            Queue(store.lists_per_second),
            Queue(store.reads_per_second),
            Queue(store.total_bytes),
        )
        self.end = fleet.warm_up + fleet.seconds
        self.first: dict[bool, list[float]] = {True: [], False: []}
        self.lives: list[float] = []
        self.counts = dict.fromkeys(("asked", "steered", "found", "done", "refused", "broken", "retried"), 0)
        self.waits: list[float] = []

        others = steps.per_prompt_token * work.prompt_read / work.answer
        self.token = [steps.token_seconds(n, work) + others * max(n - 1, 0) for n in range(fleet.places + 1)]
        self.opening = steps.fixed + steps.per_prompt_token * work.prompt_read

    def run(self) -> dict[str, Any]:
        """The figures of the measured time, which begins after the warm-up."""
        self.env.process(self._come())
        if self.fleet.dies:
            self.env.process(self._fail())
        self.env.run(until=self.end)
        took = self.fleet.seconds
        return {
            "requests_per_second": self.counts["asked"] / took,
            **self.counts,
            "hit_rate": self.counts["found"] / max(self.counts["steered"], 1),
            **_shares("ttft_steered", self.first[True]),
            **_shares("ttft_unsteered", self.first[False]),
            **_shares("concept", self.waits),
            **_shares("life", self.lives),
            "lists_per_second": self.lists.taken / self.end,
            "reads_per_second": self.reads.taken / self.end,
            "gigabytes_per_second": self.bytes.taken / self.end / 1e9,
            "store_behind_seconds": max(q.busy_until - self.end for q in (self.lists, self.reads, self.bytes)),
        }

    @property
    def _counts_now(self) -> bool:
        return self.env.now >= self.fleet.warm_up

    def _come(self) -> Generator[simpy.Event, Any, None]:
        """Arrivals."""
        n = self.fleet.replicas
        while True:
            gaps = self.rng.exponential(1 / self.rate, DRAWN).tolist()
            answers = np.maximum(self.rng.exponential(self.work.answer, DRAWN), 1.0).tolist()
            steered = self.rng.random(DRAWN) < self.work.steered
            concepts = np.where(steered, self._concepts(), -1).tolist()
            pairs = self.rng.integers(0, n, (DRAWN, 2)).tolist()
            for gap, answer, concept, pair in zip(gaps, answers, concepts, pairs, strict=True):
                yield self.env.timeout(gap)
                if self._counts_now:
                    self.counts["asked"] += 1
                self._route(Call(self.env.now, concept, answer), pair)

    def _concepts(self) -> np.ndarray:
        """Ranks drawn by popularity."""
        bins = np.searchsorted(self.popularity.cumulated_B, self.rng.random(DRAWN))
        bins = np.minimum(bins, len(self.popularity.count_B) - 1)
        inside = (self.rng.random(DRAWN) * self.popularity.count_B[bins]).astype(np.int64)
        return self.popularity.first_B[bins] + inside

    def _route(self, call: Call, pair: list[int]) -> None:
        """Send a request to the less busy of two replicas that are up."""
        while True:
            up = [self.nodes[index] for index in pair if self.nodes[index].is_up]
            if up:
                break
            pair = self.rng.integers(0, self.fleet.replicas, 2).tolist()
        node = min(up, key=lambda one: one.ongoing)
        call.replica = node.index
        ready = self._concept(node, call.concept) if call.concept >= 0 else self.env.now
        if ready <= self.env.now:
            self._queue(node, call)
            return
        self.env.timeout(ready - self.env.now).callbacks.append(lambda _: self._queue(node, call))

    def _concept(self, node: Node, concept: int) -> float:
        """When the replica has the concept and knows that it is the newest, as far as it has to."""
        now, fleet, limits = self.env.now, self.fleet, self.limits
        age = self._age(node, concept)
        held = age <= self.kept
        if self._counts_now:
            self.counts["steered"] += 1
            self.counts["found"] += held
        ready = now
        if fleet.protocol == "name" and held:
            ready = self._compare(node, concept, self.reads, 1, limits.read_seconds, now - age)
        elif fleet.protocol == "listing":
            n = pages(fleet.concepts, limits)
            ready = self._compare(node, WHOLE_STORE, self.lists, n, listing_seconds(fleet.concepts, limits), -math.inf)
        elif fleet.protocol == "feed":  # beside the requests, which never wait for it
            self._compare(node, WHOLE_STORE, self.reads, 1, limits.read_seconds, -math.inf)
        if not held:
            calls = 2 if fleet.protocol == "name" else 1  # asked for, then read
            alone = now + calls * limits.read_seconds + self.model.concept_bytes / limits.stream_bytes
            sent, asked = self.bytes.finish(now, self.model.concept_bytes), self.reads.finish(now, calls)
            ready = node.fetching[concept] = max(sent, asked, alone) + fleet.miss_seconds
            node.compared[concept] = now
        elif fleet.protocol != "name":
            ready = max(ready, node.fetching.get(concept, now))
        if self._counts_now:
            self.waits.append(ready - now)
        return ready

    def _age(self, node: Node, concept: int) -> float:
        """Seconds since the replica was last asked for the concept."""
        now, last = self.env.now, node.asked.get(concept)
        node.asked[concept] = now
        if last is not None:
            return now - last
        age = self.draws.expovariate(self.rates[bisect_right(self.firsts, concept) - 1])
        return age if age <= now - node.born else math.inf

    def _compare(self, node: Node, what: int, queue: Queue, work: int, alone: float, before: float) -> float:
        """When a request may go on whose replica last compared `what` at `before`, if not since."""
        now, period = self.env.now, self.fleet.period
        compared, ends = node.compared.get(what, before), node.fetching.get(what, now)
        if ends <= now <= compared + AHEAD * period:
            return now
        if ends <= now:
            ends = node.fetching[what] = max(queue.finish(now, work), now + alone) + self.fleet.ask_seconds
            node.compared[what] = now
            return now if now - compared < period else ends
        return ends if ends > compared + period else now

    def _queue(self, node: Node, call: Call) -> None:
        if not node.is_up:
            self._again(call)
            return
        call.ready = self.env.now
        if len(node.running) < self.fleet.places:
            self._admit(node, call)
        elif len(node.waiting) < self.fleet.queue_limit:
            node.waiting.append(call)
        elif self._counts_now:
            self.counts["refused"] += 1

    def _admit(self, node: Node, call: Call) -> None:
        """Give a place, for as long as its answer takes among those that run now."""
        now, token = self.env.now, self.token[len(node.running) + 1]
        first = now + self.opening + token
        node.running[id(call)] = (call, first)
        if self._counts_now:
            self.first[call.concept >= 0].append(first - call.at)
            self.lives.append(first - now + (call.answer - 1) * token)
        life = node.life
        done = self.env.timeout(first - now + (call.answer - 1) * token)
        done.callbacks.append(lambda _: self._leave(node, call, life))

    def _leave(self, node: Node, call: Call, life: int) -> None:
        if node.life != life:  # the replica died meanwhile
            return
        del node.running[id(call)]
        if self._counts_now:
            self.counts["done"] += 1
        if node.waiting:
            self._admit(node, node.waiting.popleft())

    def _fail(self) -> Generator[simpy.Event, Any, None]:
        """Some replicas die together and come back empty."""
        yield self.env.timeout(self.fleet.warm_up + self.fleet.seconds / 3)
        n = max(round(self.fleet.dies * self.fleet.replicas), 1)
        gone = [self.nodes[index] for index in self.rng.permutation(self.fleet.replicas)[:n]]
        for node in gone:
            node.is_up, node.life = False, node.life + 1
        for node in gone:
            lost, node.running = list(node.running.values()), {}
            waited, node.waiting = list(node.waiting), deque()
            for call, first in lost:
                if first <= self.env.now:
                    self.counts["broken"] += 1
                else:
                    self._again(call)
            for call in waited:
                self._again(call)
        yield self.env.timeout(self.fleet.restart)
        for node in gone:
            node.is_up, node.born = True, self.env.now
            node.asked, node.compared, node.fetching = {}, {}, {}

    def _again(self, call: Call) -> None:
        """What has sent nothing is sent to another replica."""
        self.counts["retried"] += 1
        self._route(call, self.rng.integers(0, self.fleet.replicas, 2).tolist())


def _shares(name: str, values: list[float]) -> dict[str, float]:
    """Median and 99th percentile, in milliseconds."""
    if not values:
        return {}
    found = np.percentile(np.array(values), (50, 99), method="inverted_cdf")
    return {f"{name}_p{share}_ms": round(1e3 * float(value), 3) for share, value in zip((50, 99), found, strict=True)}


def simulated(fleet: Fleet, steps: Steps, model: Model, work: Workload, store: ObjectStore) -> dict[str, Any]:
    """Run a scenario."""
    return Simulation(fleet, steps, model, work, store).run()
