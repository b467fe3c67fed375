"""Streams through one gateway, piece by piece, in SimPy.

Every replica takes a step, and each of its streams has a token to send. A stream that is not in the gateway's queue
enters it; the gateway takes `seconds` for a piece, in the order in which they came, and a piece brings all tokens that
its stream has by then: that is how the gateway's own code batches what waits. So a gateway that is asked too much loses
nothing: pieces become longer and further apart. With a `window` a stream enters the queue at most once in so many
seconds, wherever the hold-up is made.

Oracle: below its capacity of 1 / seconds pieces a second a gateway delays a token by its queue alone; beyond it each of
S streams is served once in S · seconds (tests).
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import simpy

from benchmarks.load import percentile


@dataclass(slots=True, eq=False)
class Stream:
    """One answer that runs on: when its oldest unsent token was made, when it sent last."""

    oldest: float | None = None
    is_queued: bool = False
    sent: float = float("-inf")


@dataclass(eq=False)
class Gateway:
    """A queue of streams and the time that one piece takes."""

    env: simpy.Environment
    seconds: float
    begins: float
    queue: deque[Stream] = field(default_factory=deque)
    gaps: list[float] = field(default_factory=list)
    delays: list[float] = field(default_factory=list)
    busy: float = 0.0
    woken: simpy.Event | None = None

    def run(self) -> Generator[simpy.Event, Any, None]:
        """Send pieces for ever."""
        while True:
            if not self.queue:
                self.woken = self.env.event()
                yield self.woken
            stream = self.queue.popleft()
            yield self.env.timeout(self.seconds)
            now = self.env.now
            if now >= self.begins:
                self.busy += self.seconds
                self.gaps.append(now - stream.sent)
                self.delays.append(now - (stream.oldest or now))
            stream.oldest, stream.is_queued, stream.sent = None, False, now

    def take(self, stream: Stream) -> None:
        """A stream has something to send."""
        stream.is_queued = True
        self.queue.append(stream)
        if self.woken is not None and not self.woken.triggered:
            self.woken.succeed()


def _replica(
    env: simpy.Environment, gateway: Gateway, streams: list[Stream], step: float, window: float, phase: float
) -> Generator[simpy.Event, Any, None]:
    yield env.timeout(phase)
    while True:
        now = env.now
        for stream in streams:
            if stream.oldest is None:
                stream.oldest = now
            if not stream.is_queued and now - stream.sent >= window:
                gateway.take(stream)
        yield env.timeout(step)


def streamed(
    replicas: int, streams: int, step: float, seconds: float, *, window: float = 0.0, lasts: float = 4.0, seed: int = 0
) -> dict[str, float]:
    """So many replicas with so many streams each behind one gateway: what a client sees, measured over the second half.

    step: seconds between two tokens of a stream. seconds: the gateway's work on a piece.
    """
    env, rng = simpy.Environment(), random.Random(seed)
    gateway = Gateway(env, seconds, lasts / 2)
    env.process(gateway.run())
    for _ in range(replicas):
        phase = rng.random() * step
        env.process(_replica(env, gateway, [Stream() for _ in range(streams)], step, window, phase))
    env.run(until=lasts)
    return {
        "replicas": replicas,
        "tokens_per_second": replicas * streams / step,
        "pieces_per_second": len(gateway.gaps) / (lasts / 2),
        "busy": round(gateway.busy / (lasts / 2), 4),
        "gap_p50_ms": round(1e3 * percentile(gateway.gaps, 0.5), 3),
        "gap_p99_ms": round(1e3 * percentile(gateway.gaps, 0.99), 3),
        "delay_p99_ms": round(1e3 * percentile(gateway.delays, 0.99), 3),
    }
