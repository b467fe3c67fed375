"""What the server measures about itself, in Prometheus' words: names of vLLM under the prefix `setpoint_`, and our own.

Gauges and counters of the engine are read when they are asked for; latencies are observed as events come, on the
engine's thread. Every label takes one of a fixed set of values: clients cannot make series.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from steering import AnyEngine, Delta, Finished, __version__
from steering.folder import Health

if TYPE_CHECKING:
    from server.jobs import Jobs

PREFIX = "setpoint"
REASONS = ("stop", "length", "abort", "error")
"""How a request may end, in the engine's words."""
REJECTIONS = ("queue_full", "jobs_full", "loading", "draining")
"""Codes of the errors that turn work away although nothing is wrong with it."""
JOB_STATES = ("queued", "running", "succeeded", "failed", "cancelled")

_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_RATIO = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_MOST = 100.0
"""Ratios beyond it are counted as this much: a client's setpoint near 0 would make the sum infinite for ever."""
_FIT = (0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)

_GAUGES = (
    ("num_requests_running", "Requests that the engine computes now.", "running"),
    ("num_requests_waiting", "Requests that wait for a place in the engine.", "waiting"),
    ("kv_cache_usage_ratio", "Share of the key/value cache that is in use.", "kv_used_ratio"),
    ("steering_programs_resident", "Distinct steering programs on the device.", "programs_resident"),
    ("steering_batch_distinct_programs", "Distinct steerings among the running requests.", "distinct_programs"),
)
_COUNTERS = (
    ("prompt_tokens", "Tokens of prompts read.", "prompt_tokens"),
    ("generation_tokens", "Tokens generated.", "generated_tokens"),
    ("engine_steps", "Steps of the engine, each one forward pass over a batch.", "steps"),
    ("prefix_cache_queries", "Tokens of prompts that could be shared.", "prefix_tokens"),
    ("prefix_cache_hits", "Tokens of prompts that were taken from the prefix cache.", "cached_tokens"),
    ("num_preemptions", "Times a request gave its keys and values back to others and was read again.", "preempted"),
    ("steering_saturated_tokens", "Tokens at which the bound on effort cut the control.", "saturated_tokens"),
)


class _Registry(CollectorRegistry):
    """A registry that leaves out when each series began, which takes a line a series and is of no use here."""

    def collect(self) -> Iterator[Metric]:
        """All metrics."""
        for metric in super().collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


class _EngineCollector(Collector):
    """The engine's own figures, read at each scrape; zeros before there is an engine, so that no series is late."""

    def __init__(self, engine: Callable[[], AnyEngine | None]) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """One look at the engine."""
        engine = self._engine()
        stats = None if engine is None else engine.stats()
        for name, text, source in _GAUGES:
            yield GaugeMetricFamily(f"{PREFIX}_{name}", text, value=getattr(stats, source, 0))
        for name, text, source in _COUNTERS:
            yield CounterMetricFamily(f"{PREFIX}_{name}", text, value=getattr(stats, source, 0))
        ends = CounterMetricFamily(f"{PREFIX}_request_success", "Requests that ended.", labels=["finished_reason"])
        finished = {} if stats is None else stats.finished
        for reason in REASONS:
            ends.add_metric([reason], finished.get(reason, 0))
        yield ends
        lost = CounterMetricFamily(
            f"{PREFIX}_steering_nonfinite", "Requests whose state was no longer finite.", labels=["action"]
        )
        lost.add_metric(["abort"], 0 if stats is None else stats.nonfinite)
        yield lost


class _StoreCollector(Collector):
    """How the place of the store is doing, read at each scrape; well, before there is a store."""

    def __init__(self) -> None:
        self.health: Callable[[], Health] = Health

    def collect(self) -> Iterator[Metric]:
        """One look at it."""
        health = self.health()
        text = "1 while the place of the store answers, 0 while reading goes on from this machine's copy."
        yield GaugeMetricFamily(f"{PREFIX}_store_reachable", text, value=float(health.is_reachable))
        text = "Times that the place of the store did not answer, or did not take a file."
        yield CounterMetricFamily(f"{PREFIX}_store_failures", text, value=health.failures)


class Metrics:
    """One application's metrics, in a registry of its own. `engine` gives the engine once there is one."""

    def __init__(self, engine: Callable[[], AnyEngine | None]) -> None:
        self.registry = _Registry()
        self.registry.register(_EngineCollector(engine))
        self._store = _StoreCollector()
        self.registry.register(self._store)
        ProcessCollector(namespace=PREFIX, registry=self.registry)
        self._info = self._gauge("build_info", "1, labelled with the version that runs.", ["version"])
        self._info.labels(__version__).set(1)
        self._ready = self._gauge("ready", "1 while requests are served, 0 while loading and while draining.", [])
        self._rejections = self._counter("admission_rejections", "Calls turned away, by the error's code.", ["reason"])
        for reason in REJECTIONS:
            self._rejections.labels(reason)
        self._http = self._counter("http_requests", "HTTP requests answered.", ["route", "status"])
        self.first_token = self._histogram("time_to_first_token_seconds", "From arrival to the first token.", _LATENCY)
        self.between_tokens = self._histogram("inter_token_latency_seconds", "Between two tokens.", _LATENCY)
        self.end_to_end = self._histogram("e2e_request_latency_seconds", "From arrival to a completed end.", _LATENCY)
        self.queued = self._histogram("request_queue_time_seconds", "From arrival to the first step.", _LATENCY)
        self.tracking_error = self._histogram(
            "steering_tracking_error_ratio", "Per request and concept: |setpoint - mean| / |setpoint|.", _RATIO
        )
        self.effort = self._histogram(
            "steering_effort_ratio", "Per steered request: mean of |u| / |x| over layers and tokens.", _RATIO
        )
        self._fit_jobs = self._gauge("fit_jobs", "Jobs of fitting and sweeping, by state.", ["state"])
        self._fit_seconds = self._histogram("fit_seconds", "Time that a successful fit took.", _FIT)
        for state in JOB_STATES:
            self._fit_jobs.labels(state)

    def _gauge(self, name: str, text: str, labels: list[str]) -> Gauge:
        return Gauge(f"{PREFIX}_{name}", text, labels, registry=self.registry)

    def _counter(self, name: str, text: str, labels: list[str]) -> Counter:
        return Counter(f"{PREFIX}_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", text, buckets=buckets, registry=self.registry)

    def watch_readiness(self, is_ready: Callable[[], bool]) -> None:
        """Report what `/health/ready` would answer now; until this is called it is not ready."""
        self._ready.set_function(lambda: float(is_ready()))

    def watch_store(self, health: Callable[[], Health]) -> None:
        """Report how the place of the store is doing."""
        self._store.health = health

    def watch_jobs(self, jobs: Jobs) -> None:
        """Report these jobs: how many are in each state, and how long each fit took."""

        def count(state: str) -> Callable[[], float]:
            return lambda: jobs.counts().get(state, 0)

        def ended(kind: str, state: str, seconds: float) -> None:
            if kind == "fit" and state == "succeeded":
                self._fit_seconds.observe(seconds)

        for state in JOB_STATES:
            self._fit_jobs.labels(state).set_function(count(state))
        jobs.on_finished.append(ended)

    def refused(self, code: str | None) -> None:
        """Count an error, if it is one that turns work away."""
        if code in REJECTIONS:
            self._rejections.labels(code).inc()

    def answered(self, route: str | None, status: int) -> None:
        """Count an answer. `route` is the pattern of the address, not the address; None where nothing matched."""
        self._http.labels(route or "none", str(status)).inc()

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """The text, in the format that the Accept header prefers, and its content type."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type


class Watch:
    """The times of one request, from now on. `see` is called with its events in order, on one thread."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._began = self._last = time.monotonic()
        self._has_token = False

    def see(self, event: Delta | Finished) -> None:
        """Observe one event."""
        now = time.monotonic()
        metrics = self._metrics
        if isinstance(event, Delta):
            (metrics.between_tokens if self._has_token else metrics.first_token).observe(now - self._last)
            self._has_token, self._last = True, now
            return
        if event.queued_seconds is not None:
            metrics.queued.observe(event.queued_seconds)
        if event.reason in ("stop", "length"):  # how long an aborted one ran says something about its client only
            metrics.end_to_end.observe(now - self._began)
        if event.receipt is not None and event.receipt.tokens_steered:
            metrics.effort.observe(min(event.receipt.effort["mean"], _MOST))
            for held in event.receipt.tracking.values():
                if held.setpoint and math.isfinite(held.error):
                    metrics.tracking_error.observe(min(held.error / abs(held.setpoint), _MOST))
