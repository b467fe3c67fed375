"""Closed forms: popularity, what a cache of concepts finds, what N replicas ask of a store of M concepts.

Popularity is Zipf's: p_k ∝ k^−s for k ≤ M. Ranks up to `EXACT` are kept one by one and the rest in bins of equal ratio,
each with the mass between its borders (midpoint rule of the integral), so that ten million concepts are a few thousand
numbers.

A cache of C of the least recently used is taken to hold what was asked for within its characteristic time T (Che, Tung
and Wang, 2002), which solves Σ_k 1 − exp(−λ_k T) = C. What it finds is Σ_k p_k (1 − exp(−λ_k T)). Oracle: a cache that
is simulated request by request (tests).

Three ways of noticing that somebody else has replaced a concept. A comparison holds for `period` seconds, and after a
part of them, q, the next request begins another while it goes on itself (FRESH and AHEAD in steering.mirror):

    listing   list the whole store                           N · ⌈M / page⌉ / max(time of a listing, q + 1 / Σ λ)
    name      ask for each name that is in use               N · Σ_k λ_k / (1 + λ_k · q)
    feed      read one small object that names the changes   N / (q + 1 / Σ λ)

λ_k is the rate of requests for k at one replica: a renewal process of a comparison, q seconds, and the wait for the
next request. The mirror lists up to LISTABLE files and asks name by name beyond; a feed is what it does not have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from benchmarks.capacity.assumptions import ObjectStore
from steering.mirror import AHEAD

EXACT = 4096
"""Ranks with a number of their own."""
PER_OCTAVE = 32
Protocol = Literal["listing", "name", "feed"]


@dataclass(frozen=True, eq=False)
class Popularity:
    """Bins of concepts: how many are in each, and the probability of one of them."""

    count_B: np.ndarray
    each_B: np.ndarray
    cumulated_B: np.ndarray
    first_B: np.ndarray

    @property
    def concepts(self) -> int:
        """M."""
        return int(self.count_B.sum())


@lru_cache(maxsize=32)
def zipf(concepts: int, exponent: float) -> Popularity:
    """Popularity of so many concepts."""
    head = np.arange(1, min(concepts, EXACT) + 2)
    if concepts > EXACT:
        n_bins = math.ceil(PER_OCTAVE * math.log2(concepts / EXACT))
        tail = np.unique(np.geomspace(EXACT + 1, concepts + 1, n_bins + 1).round().astype(np.int64))
        head = np.concatenate([head[:-1], tail])
    count_B = np.diff(head)
    middle_B = np.where(count_B == 1, head[:-1], head[:-1] + (count_B - 1) / 2)
    each_B = middle_B.astype(float) ** -exponent
    each_B /= (each_B * count_B).sum()
    return Popularity(count_B, each_B, np.cumsum(each_B * count_B), head[:-1] - 1)


def characteristic_time(popularity: Popularity, rate: float, capacity: int) -> float:
    """T of a cache of `capacity` concepts under `rate` requests a second; infinite when all of them fit."""
    if capacity >= popularity.concepts:
        return math.inf
    low, high = 0.0, 1.0
    while _held(popularity, rate, high) < capacity:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _held(popularity, rate, middle) < capacity else (low, middle)
    return high


def _held(popularity: Popularity, rate: float, time: float) -> float:
    """Distinct concepts asked for within a time."""
    return float((popularity.count_B * -np.expm1(-rate * popularity.each_B * time)).sum())


def distinct(popularity: Popularity, requests: float) -> float:
    """Distinct concepts among so many requests."""
    return _held(popularity, requests, 1.0)


def hit_rate(popularity: Popularity, rate: float, time: float) -> float:
    """Share of the requests whose concept was asked for within `time` before."""
    if math.isinf(time):
        return 1.0
    weight_B = popularity.count_B * popularity.each_B
    return float((weight_B * -np.expm1(-rate * popularity.each_B * time)).sum())


def pages(concepts: int, store: ObjectStore) -> int:
    """Requests that one listing takes."""
    return max(math.ceil(concepts / store.keys_per_page), 1)


def listing_seconds(concepts: int, store: ObjectStore) -> float:
    """A listing's time: its pages one after another, and what reading them costs the client."""
    return pages(concepts, store) * store.list_seconds + concepts * store.key_seconds


def checks_per_second(
    protocol: Protocol, replicas: int, popularity: Popularity, rate: float, period: float, store: ObjectStore
) -> float:
    """Requests a second to the store that only ask what is new; `rate`: steered requests a second at a replica."""
    quiet = AHEAD * period
    each = quiet + 1 / rate
    if protocol == "listing":
        n = pages(popularity.concepts, store)
        return replicas * n / max(each, listing_seconds(popularity.concepts, store))
    if protocol == "feed":
        return replicas / each
    each_B = rate * popularity.each_B
    return replicas * float((popularity.count_B * each_B / (1 + each_B * quiet)).sum())
