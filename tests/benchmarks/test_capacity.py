"""The capacity model against closed forms, and one level of detail against another."""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("simpy", reason="pip install setpoint[dev]")

from benchmarks.capacity.assumptions import Accelerator, Model, ObjectStore, Workload
from benchmarks.capacity.day import Course, Day
from benchmarks.capacity.fleet import Fleet, simulated
from benchmarks.capacity.formulas import characteristic_time, checks_per_second, distinct, hit_rate, zipf
from benchmarks.capacity.gateway import streamed
from benchmarks.capacity.replica import Job, served
from benchmarks.capacity.service import Steps, places_that_fit, roofline
from benchmarks.memory import SCALARS
from tests.tolerances import CAPACITY_NOISE

MODEL, WORK, STORE = Model(), Workload(), ObjectStore()
STEPS = roofline(Accelerator(), MODEL)
SMALL = Fleet(replicas=40, concepts=5000, protocol="feed", cache=400)


def test_one_place_is_an_m_d_1_queue() -> None:
    """Prompts and answers of one token: a fixed service time, so the wait is that of Pollaczek and Khinchine."""
    rng, step, load = random.Random(0), 0.01, 0.7
    service = step  # the step that reads the prompt draws the token
    at, jobs = 0.0, []
    for _ in range(20_000):
        at += rng.expovariate(load / service)
        jobs.append(Job(at, 1, 1))
    done = served(Steps(step, 0.0, 0.0, 0.0), 1, jobs)
    wait = float(np.mean([job.times[-1] - job.at for job in done])) - service
    assert wait == pytest.approx(load * service / (2 * (1 - load)), rel=CAPACITY_NOISE)


@pytest.mark.parametrize("places", [1, 8, 32])
def test_a_full_replica_serves_what_the_closed_form_says(places: int) -> None:
    work = Workload(prompt=33, cached=0.0, answer=64)
    jobs = [Job(0.0, work.prompt, work.answer) for _ in range(20 * places)]
    done = served(STEPS, places, jobs)
    rate = len(jobs) / max(job.times[-1] for job in done)
    assert rate == pytest.approx(STEPS.throughput(places, work), rel=CAPACITY_NOISE)
    assert all(len(job.times) == work.answer for job in done)


def test_a_prompt_is_read_in_chunks_and_its_end_alone() -> None:
    """40 tokens: two blocks in one step, the other 8 in one of their own, which draws the first token."""
    (job,) = served(Steps(1.0, 0.0, 0.0, 0.0), 1, [Job(0.0, 40, 2)])
    assert job.times == [2.0, 3.0]
    (job,) = served(Steps(1.0, 0.0, 0.0, 0.0), 1, [Job(0.0, 1100, 1)])  # 512, 512, 64, 12
    assert job.times == [4.0]


@given(n=st.integers(2, 3000), exponent=st.floats(0.6, 1.4))
@settings(max_examples=30, deadline=None)
def test_popularity_of_few_is_zipfs_exactly(n: int, exponent: float) -> None:
    found = zipf(n, exponent)
    weight = np.arange(1, n + 1) ** -exponent
    np.testing.assert_allclose(found.each_B, weight / weight.sum(), rtol=1e-12)


def test_popularity_in_bins_is_near_the_exact_one() -> None:
    n = 200_000
    found, weight = zipf(n, 1.0), 1 / np.arange(1, n + 1)
    assert found.concepts == n
    weight /= weight.sum()
    assert found.cumulated_B[-1] == pytest.approx(1.0)
    for requests in (10.0, 1e4, 1e6):
        exact = float(-np.expm1(-requests * weight).sum())
        assert distinct(found, requests) == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("capacity", [20, 200])
def test_a_cache_finds_what_one_simulated_request_by_request_finds(capacity: int) -> None:
    popularity, rng = zipf(2000, 1.0), np.random.default_rng(0)
    cache: OrderedDict[int, None] = OrderedDict()
    found, ranks = 0, rng.choice(2000, 60_000, p=popularity.each_B)
    for index, rank in enumerate(ranks.tolist()):
        if rank in cache:
            found += index >= 20_000
            cache.move_to_end(rank)
        else:
            cache[rank] = None
            if len(cache) > capacity:
                cache.popitem(last=False)
    expected = hit_rate(popularity, 1.0, characteristic_time(popularity, 1.0, capacity))
    assert found / 40_000 == pytest.approx(expected, abs=0.01)
    assert hit_rate(popularity, 1.0, characteristic_time(popularity, 1.0, 2000)) == 1.0


@pytest.mark.parametrize(("protocol", "concepts"), [("listing", 60), ("name", 5000), ("feed", 5000)])
def test_the_store_is_asked_as_often_as_the_closed_form_says(protocol: str, concepts: int) -> None:
    fleet = replace(SMALL, protocol=protocol, concepts=concepts, seconds=12.0)
    found = simulated(fleet, STEPS, MODEL, WORK, STORE)
    popularity = zipf(concepts, WORK.zipf)
    steered = fleet.load * STEPS.throughput(fleet.places, WORK) * WORK.steered
    expected = checks_per_second(protocol, fleet.replicas, popularity, steered, fleet.period, STORE)
    if protocol != "listing":  # what is not held is read on top
        expected += fleet.replicas * steered * (1 - found["hit_rate"])
    asked = found["lists_per_second"] + found["reads_per_second"]
    assert asked == pytest.approx(expected, rel=CAPACITY_NOISE)


def test_a_fleet_finds_what_its_caches_hold_and_serves_what_comes() -> None:
    found = simulated(replace(SMALL, seconds=12.0), STEPS, MODEL, WORK, STORE)
    popularity = zipf(SMALL.concepts, WORK.zipf)
    steered = SMALL.load * STEPS.throughput(SMALL.places, WORK) * WORK.steered
    expected = hit_rate(popularity, steered, characteristic_time(popularity, steered, SMALL.cache))
    assert found["hit_rate"] == pytest.approx(expected, rel=CAPACITY_NOISE)
    assert found["refused"] == found["broken"] == 0
    assert found["done"] == pytest.approx(found["asked"], rel=CAPACITY_NOISE)


def test_a_store_that_is_asked_too_much_falls_behind_and_one_that_is_not_does_not() -> None:
    slow = ObjectStore(reads_per_second=40.0)
    behind = [simulated(SMALL, STEPS, MODEL, WORK, store)["store_behind_seconds"] for store in (STORE, slow)]
    assert behind[0] < 0.1 < 1.0 < behind[1]


def test_replicas_that_fail_break_what_they_had_begun_and_come_back_empty() -> None:
    none, some = (simulated(replace(SMALL, dies=share), STEPS, MODEL, WORK, STORE) for share in (0.0, 0.5))
    assert none["broken"] == 0 < some["broken"]
    assert some["hit_rate"] < none["hit_rate"]
    assert simulated(replace(SMALL, dies=0.5), STEPS, MODEL, WORK, STORE) == some  # the same seed, the same run


def test_a_request_of_the_fleet_lasts_as_long_as_one_of_the_replica_step_by_step() -> None:
    """The life that is frozen at admission beside the steps themselves, under the same arrivals at one replica."""
    work = replace(WORK, answer=64, prompt=33, cached=0.0)
    rate, rng, at, jobs = 0.6 * STEPS.throughput(32, work), np.random.default_rng(1), 0.0, []
    for _ in range(6000):
        at += float(rng.exponential(1 / rate))
        jobs.append(Job(at, work.prompt, max(round(float(rng.exponential(work.answer))), 1)))
    lives = [job.times[-1] - job.at for job in served(STEPS, 32, jobs)]
    found = simulated(replace(SMALL, seconds=12.0), STEPS, MODEL, work, STORE)
    assert found["life_p50_ms"] / 1e3 == pytest.approx(float(np.median(lives)), rel=0.15)


def test_a_gateway_below_its_capacity_sends_every_token_and_beyond_it_in_turns() -> None:
    step, seconds, streams = 0.01, 1e-4, 32
    easy, hard = streamed(2, streams, step, seconds), streamed(16, streams, step, seconds)
    assert easy["busy"] == pytest.approx(2 * streams / step * seconds, rel=0.02)
    assert easy["gap_p50_ms"] == pytest.approx(1e3 * step, rel=0.02)
    assert easy["delay_p99_ms"] <= 1e3 * 2 * streams * seconds * 1.01
    assert hard["pieces_per_second"] == pytest.approx(1 / seconds, rel=0.01)
    assert hard["gap_p50_ms"] == pytest.approx(1e3 * 16 * streams * seconds, rel=0.25)
    held = streamed(2, streams, step, seconds, window=0.05)
    assert held["pieces_per_second"] == pytest.approx(2 * streams / 0.05, rel=0.25)


def test_a_calm_day_needs_arrivals_by_throughput() -> None:
    calm = Day(peak=500.0, start=60.0, ebb=1.0, rush=0.0, mean_life=math.inf)
    found = Course(calm, STEPS, WORK).run(7200.0)
    places = calm.target * calm.places
    rate = places / (STEPS.life(round(places), WORK))
    assert found["replica_hours"] / 2 == pytest.approx(calm.peak / rate, rel=0.1)
    assert found["refused_share"] == found["broken"] == 0


def test_a_slow_start_makes_a_rush_wait() -> None:
    day = Day(peak=500.0, start=60.0, rush_at=1800.0, rush=1.0, ebb=1.0, mean_life=math.inf)
    quick, slow = (Course(replace(day, start=start), STEPS, WORK).run(3600.0) for start in (10.0, 600.0))
    assert quick["wait_most_seconds"] < slow["wait_most_seconds"]


def test_sizes_are_those_of_the_formats() -> None:
    """A position by the shapes, a program as `benchmarks.memory` counts it; places until the memory is full."""
    assert MODEL.position_bytes == 2 * 2 * 32 * 8 * 128
    assert MODEL.program_bytes == 31 * (2 * 4096 + SCALARS) * 4
    fits = places_that_fit(Accelerator(), MODEL, WORK)
    used = MODEL.weight_bytes + 256 * MODEL.program_bytes + fits * 768 * MODEL.position_bytes
    assert used <= 0.9 * 141e9 < used + 768 * MODEL.position_bytes
