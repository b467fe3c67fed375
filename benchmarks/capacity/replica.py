"""One replica, step by step, in SimPy: places, chunked prompts, a queue. The engine's scheduler without its tensors.

A step takes one token of each request that decodes, then prompts up to `step_tokens`, first come first served; what
lies behind a prompt's last full block is read in a step of its own (steering.runtime.scheduler). The time of a step is
`Steps.seconds`. Oracles: an M/D/1 queue with one place, and `Steps.throughput` with all places taken (tests).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from typing import Any

import simpy

from benchmarks.capacity.service import Steps

BLOCK = 16
"""Positions of a block of keys and values."""


@dataclass(slots=True, eq=False)
class Job:
    """A request: when it comes, what it brings, when its tokens came."""

    at: float
    prompt: int
    answer: int
    read: int = 0
    times: list[float] = field(default_factory=list)

    @property
    def context(self) -> int:
        """Positions in the cache."""
        return self.read + len(self.times)

    @property
    def next_read(self) -> int:
        """Tokens of the prompt that may be read together next: all full blocks, then the rest."""
        whole = (self.prompt - 1) // BLOCK * BLOCK
        return (whole if self.read < whole else self.prompt) - self.read


class Replica:
    """Serves jobs in the order in which they come."""

    def __init__(self, env: simpy.Environment, steps: Steps, places: int, step_tokens: int = 512) -> None:
        self.env = env
        self.steps = steps
        self.places = places
        self.step_tokens = step_tokens
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self._woken = env.event()
        env.process(self._serve())

    def submit(self, job: Job) -> None:
        """Queue a job."""
        self.waiting.append(job)
        if not self._woken.triggered:
            self._woken.succeed()

    def _serve(self) -> Generator[simpy.Event, Any, None]:
        while True:
            while self.waiting and len(self.running) < self.places:
                self.running.append(self.waiting.popleft())
            if not self.running:
                self._woken = self.env.event()
                yield self._woken
                continue
            yield self.env.timeout(self._step())
            for job in self.running:
                if job.read == job.prompt:
                    job.times.append(self.env.now)
            self.running = [job for job in self.running if len(job.times) < job.answer]

    def _step(self) -> float:
        """Read prompts and say how long the step takes."""
        decoding = [job for job in self.running if job.read == job.prompt]
        budget = left = max(self.step_tokens - len(decoding), BLOCK)
        context = sum(job.context for job in decoding)
        for job in self.running:
            if job.read < job.prompt and left:
                n = min(job.next_read, left)
                job.read, left = job.read + n, left - n
        return self.steps.seconds(len(decoding), context, budget - left)


def served(steps: Steps, places: int, jobs: Iterable[Job], ahead: float = 0.0) -> list[Job]:
    """Run jobs, in the order of their arrival, to their ends. `ahead` seconds pass between an arrival and the queue."""
    env, planned = simpy.Environment(), list(jobs)
    replica = Replica(env, steps, places)

    def come() -> Generator[simpy.Event, Any, None]:
        for job in planned:
            yield env.timeout(max(job.at + ahead - env.now, 0.0))
            replica.submit(job)

    env.process(come())
    env.run()
    return planned
