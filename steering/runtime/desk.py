"""Where requests come in from any thread and events go out: what every engine has in common.

`submit` queues, `abort` notes, `stop` closes; the thread that runs the steps takes from the queue and hands over what
its requests have turned into. `AnyEngine` is all that the server and the evaluation need of one.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Iterable
from typing import Protocol

from steering.errors import QueueFull, SpecError
from steering.plant.plant import Plant
from steering.runtime.live import Deliver, Live
from steering.runtime.request import Event, Finished, Request
from steering.runtime.settings import EngineSettings, Stats


class AnyEngine(Protocol):
    """Continuous batching of requests that are each steered in their own way, whatever computes them."""

    @property
    def plant(self) -> Plant:
        """The model, for whatever is read beside the engine."""

    @property
    def settings(self) -> EngineSettings:
        """Its sizes."""

    @property
    def max_model_len(self) -> int:
        """Positions a sequence may have: prompt and completion together."""

    @property
    def eos(self) -> frozenset[int]:
        """The tokens that end a sequence."""

    @property
    def is_closing(self) -> bool:
        """Whether `stop` was called."""

    def submit(self, request: Request, deliver: Deliver) -> None:
        """Queue a request; its events go to `deliver` and end with one `Finished`."""

    def abort(self, request_id: str) -> None:
        """End a request with reason "abort"."""

    def generate(self, requests: Iterable[Request]) -> list[Finished]:
        """Run requests to their ends, in the order given."""

    def start(self) -> None:
        """Run the steps on a thread, until `stop`."""

    def stop(self, drain_seconds: float = 0.0) -> None:
        """Refuse new requests, let the others finish for so long, abort the rest."""

    def stats(self) -> Stats:
        """A look at the engine."""


class Desk(ABC):
    """Requests that wait, run or are to end. What is below the line belongs to the thread that runs the steps."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings: EngineSettings = settings
        self._live: dict[str, Live] = {}
        self._counts: Counter[str] = Counter()
        self._finished: Counter[str] = Counter()
        self._wake = threading.Condition()
        self._inbox: deque[Live] = deque()
        self._aborts: deque[str] = deque()
        self._outstanding: set[str] = set()
        self._closing = False

    @abstractmethod
    def submit(self, request: Request, deliver: Deliver) -> None:
        """Queue a request; its events go to `deliver`, on the engine's thread, and end with one `Finished`."""

    def abort(self, request_id: str) -> None:
        """End a request before the next step, with reason "abort". Does nothing if there is none of this id."""
        with self._wake:
            self._aborts.append(request_id)
            self._wake.notify_all()

    @property
    def is_closing(self) -> bool:
        """Whether `stop` was called: no request is taken any more."""
        return self._closing

    def generate(self, requests: Iterable[Request]) -> list[Finished]:
        """Run requests to their ends, in the order given; any number, whatever the queue's limit.

        Raises what `submit` raises, QueueFull only when shutting down.
        """
        waiting, order = deque(requests), list[str]()
        done: dict[str, Finished] = {}
        arrived = threading.Condition()

        def deliver(event: Event) -> None:
            if isinstance(event, Finished):
                with arrived:
                    done[event.request_id] = event
                    arrived.notify_all()

        while waiting or len(done) < len(order):
            while waiting and (self._closing or len(self._outstanding) < self.settings.max_batch):
                try:
                    self.submit(waiting[0], deliver)
                except QueueFull:
                    if self._closing:
                        raise
                    break  # others were quicker; their requests will make room
                order.append(waiting.popleft().id)
            if not self._drive():
                with arrived:
                    arrived.wait(timeout=0.05)
        return [done[request_id] for request_id in order]

    def _drive(self) -> bool:
        """Do a step on the caller's thread. False where the engine has a thread of its own."""
        return False

    def _queue(self, live: Live) -> None:
        """Queue a request that has been checked. Raises QueueFull, and SpecError for an id that is in use."""
        with self._wake:
            self._check_open()
            limit = self.settings.max_batch + self.settings.queue_limit
            if len(self._outstanding) >= limit:
                self._counts["rejected"] += 1
                raise QueueFull(f"All {limit} places are taken: try again in a moment.")
            if live.request.id in self._outstanding:
                raise SpecError("id", expected="an id that no running request has", got=live.request.id)
            self._outstanding.add(live.request.id)
            self._inbox.append(live)
            self._wake.notify_all()

    def _check_open(self) -> None:
        """Raises QueueFull once `stop` was called."""
        if self._closing:
            self._counts["rejected"] += 1
            raise QueueFull("The server is shutting down: send the request to another one.")

    # ── on the engine's thread ───────────────────────────────────────────────────────────────────────────────────────

    def _take(self) -> tuple[deque[Live], deque[str]]:
        """Who arrived and who is to be aborted since the last call."""
        with self._wake:
            arrived, self._inbox = self._inbox, deque()
            aborted, self._aborts = self._aborts, deque()
        return arrived, aborted

    def _leave(self, live: Live, finished: Finished) -> None:
        """Make room for others and deliver the end of a request."""
        if live.tally is not None:
            self._counts["saturated_tokens"] += live.tally.saturated
        self._finished[finished.reason] += 1
        with self._wake:
            self._outstanding.discard(finished.request_id)
            self._wake.notify_all()
        hand_over(live, finished)


def hand_over(live: Live, event: Event) -> bool:
    """Deliver an event. False if the receiver failed, which is its request's own affair."""
    try:
        live.deliver(event)
    except Exception:
        return False
    return True
