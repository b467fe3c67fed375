"""The gateway's service: no model of its own, but processes that have it, and what is known of them."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from typing import Any, cast

from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.middleware import Middleware

from server.app import PARTS, create_app
from server.host import Host, Service, State
from server.replicas.copies import Copies, Fleet, Generation, Lost, Nobody
from server.replicas.exposition import Merged
from server.replicas.ledger import Ledger
from server.schema.errors import ApiError
from server.settings import ServerSettings
from steering import SteeringError

PULSE_SECONDS = 1.0
ROLL_SECONDS = 600.0
"""How long a rolling restart waits for the calls on the processes that it replaces."""
log = logging.getLogger("setpoint")


def gateway(settings: ServerSettings, fleet: Fleet) -> FastAPI:
    """The application of the gateway: that of a server of one process, with a middleware that hands on."""
    from server.replicas.forward import Forward

    portal = Portal(settings, fleet)
    app = create_app(settings, service=portal, loads=False)
    routes = [route for part in PARTS for route in part.router.routes]
    app.user_middleware.append(Middleware(cast(Any, Forward), portal=portal, routes=routes))
    return app


class Portal(Service):
    """Whether requests are served, by which processes, and the jobs of all of them."""

    def __init__(self, settings: ServerSettings, fleet: Fleet) -> None:
        super().__init__(settings)
        self.jobs = self.ledger = Ledger()
        self.metrics.watch_jobs(self.ledger)
        self.places: dict[str, Copies] = {}
        """The process that runs jobs, by its place; there are two of them during a rolling restart."""
        self._fleet = fleet
        self._generations: list[Generation] = []
        """The newest is the last; those before it finish what they have."""
        self._ready = 0
        self._deserted: set[Copies] = set()
        """Of which there was no process at the last look."""
        # Ray's own processes end with the thread that started them: they do not outlive a gateway that is killed.
        self._thread = ThreadPoolExecutor(1, "setpoint-ray")
        self._tasks: set[asyncio.Task[None]] = set()
        self._journals: dict[int, asyncio.Task[None]] = {}
        self._known: dict[str, int] = {}
        """Process of each replica by its name."""
        self._is_rolling = self._is_closed = False

    @property
    def state(self) -> State:
        """Whether requests are served now: by at least one replica."""
        return "draining" if self.is_draining else "ready" if self._generations and self._ready else "loading"

    @property
    def generation(self) -> Generation:
        """The processes that take new calls."""
        return self._generations[-1]

    def ready_host(self) -> Host:
        """Raises ApiError 503: what comes here found no replica."""
        state = "loading" if self.state == "ready" else self.state
        raise ApiError(503, f"The server is {state}; try again later.", code=state, headers={"Retry-After": "1"})

    def enter(self) -> Generation:
        """The processes for one call, which are kept until it leaves."""
        self.generation.running += 1
        return self.generation

    def leave(self, generation: Generation) -> None:
        """A call is over."""
        generation.running -= 1

    def is_deserted(self, copies: Copies) -> bool:
        """Whether there is none of these processes that could answer."""
        return copies in self._deserted

    async def is_used(self, artifact: str) -> bool:
        """Whether a running request anywhere is steered by an artifact. Raises ApiError when that cannot be found."""
        found: list[bool] = []
        try:
            for generation in tuple(self._generations):
                found += await generation.serving.each("uses", artifact)
        except (TimeoutError, Nobody) as error:
            raise ApiError(
                503, "Not every replica answers; try again later.", code="loading", headers={"Retry-After": "1"}
            ) from error
        return any(found)

    async def exposition(self, accept: str) -> tuple[bytes, str]:
        """The metrics of the gateway and of every process that answers, and their content type."""
        asked = (self.generation.serving, self.generation.writing) if self._generations else ()
        told = await asyncio.gather(*(copies.each("metrics") for copies in asked), return_exceptions=True)
        parts = [part for found in told if not isinstance(found, BaseException) for part in found]
        encode, content_type = choose_encoder(accept)
        merged = cast(CollectorRegistry, Merged(self.metrics.registry, parts))
        return await asyncio.to_thread(encode, merged), content_type

    # ── from start to end ────────────────────────────────────────────────────────────────────────────────────────────

    async def load(self) -> None:
        """Start all processes. Raises SteeringError."""
        await self._on_thread(self.sweep)
        await self._on_thread(self._fleet.start)
        if self.is_draining:
            raise SteeringError("The server was told to end while it was loading.")
        is_main = threading.current_thread() is threading.main_thread()
        for sig in (signal.SIGINT, signal.SIGTERM) if is_main else ():  # Ray's own would print a trace, then call ours
            signal.signal(sig, signal.getsignal(sig))
        if is_main and hasattr(signal, "SIGHUP"):
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, lambda: self._go(self.roll()))
        fresh = await self._on_thread(self._fleet.deploy)
        self._ready = await _models(fresh)
        self._begin(fresh)
        self._go(self._beat())

    async def drain(self, wait: Callable[[], bool] = lambda: False) -> None:
        """Refuse new calls and jobs; let calls that run finish within `drain_seconds`."""
        self.is_draining = True
        self._fleet.give_up()
        everywhere = [copies for one in self._generations for copies in (one.serving, one.writing)]
        seconds = self.settings.drain_seconds + 5.0
        for copies in everywhere:
            self._go(_told(copies, "drain", seconds))
        deadline, is_cut = time.monotonic() + seconds, False
        while any(one.running for one in self._generations) and time.monotonic() < deadline:
            if wait() and not is_cut:
                is_cut, deadline = True, time.monotonic() + 5.0
                for copies in everywhere:
                    self._go(_told(copies, "cut", 2.0))
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        """End every process. May be called twice."""
        self.is_draining = True
        if self._is_closed:
            return
        self._is_closed = True
        self._fleet.give_up()
        for task in (*self._tasks, *self._journals.values()):
            task.cancel()
        await asyncio.gather(*self._tasks, *self._journals.values(), return_exceptions=True)
        await self._on_thread(self._fleet.stop)
        self._thread.shutdown()

    async def roll(self) -> None:
        """New processes in place of all: they take the calls as soon as they are ready, the old ones finish theirs."""
        if self._is_rolling or self.is_draining or not self._generations:
            log.warning("no rolling restart: one is under way, or the server begins or ends")
            return
        self._is_rolling = True
        try:
            fresh = await self._on_thread(self._fleet.deploy)
            try:
                self._ready = await _models(fresh)
            except (SteeringError, TimeoutError, Nobody):
                await self._on_thread(self._fleet.delete, fresh)
                raise
            self._begin(fresh)
            log.info("rolled", extra={"fields": {"generation": fresh.number}})
            for old in self._generations[:-1]:
                await self._retire(old)
        except Exception as error:  # Ray's, too: what serves goes on
            reason = error.message if isinstance(error, SteeringError) else repr(error)[:300]
            log.error("a rolling restart failed", extra={"fields": {"reason": reason}})
        finally:
            self._is_rolling = False

    async def _retire(self, old: Generation) -> None:
        """End processes that take no more calls, once the last call and the last job there are over."""
        deadline = time.monotonic() + ROLL_SECONDS
        while old.running and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        while any(copies is old.writing and self.ledger.is_busy(place) for place, copies in self.places.items()):
            await asyncio.sleep(0.1)
        self._generations.remove(old)
        self._deserted -= {old.serving, old.writing}
        self._journals.pop(old.number).cancel()
        self.places = {place: copies for place, copies in self.places.items() if copies is not old.writing}
        await self._on_thread(self._fleet.delete, old)

    def _begin(self, fresh: Generation) -> None:
        self._generations.append(fresh)
        self._journals[fresh.number] = asyncio.ensure_future(self._read_journal(fresh.writing))

    # ── what is told by the processes ────────────────────────────────────────────────────────────────────────────────

    async def _beat(self) -> None:
        """Who is there, and what they logged, once a second."""
        while True:
            for generation in tuple(self._generations):
                for copies in (generation.serving, generation.writing):
                    try:
                        pulses = await copies.each("pulse")
                    except TimeoutError:  # somebody is slow: Ray Serve asks after their health, and acts
                        continue
                    except Nobody:
                        pulses = []
                    except Exception as error:  # Ray's: the next second may know more
                        log.error("no pulse", exc_info=error)
                        continue
                    has_model = any(pulse["failure"] is None for pulse in pulses)
                    (self._deserted.discard if has_model else self._deserted.add)(copies)
                    if generation is self.generation and copies is generation.serving:
                        self._ready = sum(pulse["failure"] is None for pulse in pulses)
                        self._compare({pulse["name"]: pulse["pid"] for pulse in pulses})
                    for pulse in pulses:
                        _write(pulse)
            await asyncio.sleep(PULSE_SECONDS)

    def _compare(self, now: dict[str, int]) -> None:
        """Log who came and who went."""
        for event, one, other in (("replica gone", self._known, now), ("replica ready", now, self._known)):
            for name, pid in one.items():
                if other.get(name) != pid:
                    log.info(event, extra={"fields": {"replica": name, "pid": pid}})
        self._known = now

    async def _read_journal(self, writing: Copies) -> None:
        """Follow the jobs of a writer, and of those that take its place when it ends."""
        place: str | None = None
        while True:
            try:
                async with aclosing(writing.stream("journal")) as entries:
                    async for entry in entries:
                        if entry["place"] != place and place is not None:
                            self._forget(place)
                        place = entry["place"]
                        self.places[entry["place"]] = writing
                        if "job" in entry:
                            self.ledger.learn(entry["job"], entry["place"])
            except (Lost, Nobody):
                pass
            except Exception as error:  # Ray's: without the journal no job would ever end here
                log.error("no journal", exc_info=error)
            if place is not None and not self.is_draining:
                self._forget(place)
                place = None
            await asyncio.sleep(0.2)

    def _forget(self, place: str) -> None:
        log.warning("the writing process ended", extra={"fields": {"place": place}})
        self.places.pop(place, None)
        self.ledger.lose(place)

    def _go(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _on_thread(self, work: Callable[..., Any], *arguments: object) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)


async def _models(fresh: Generation) -> int:
    """How many replicas have a model. Raises SteeringError, with the reason, if one process has none."""
    found = 0
    for copies in (fresh.serving, fresh.writing):
        for pulse in await copies.each("pulse", seconds=60.0):
            _write(pulse)
            if pulse["failure"]:
                raise SteeringError(pulse["failure"])
            found += copies is fresh.serving
    return found


async def _told(copies: Copies, method: str, seconds: float) -> None:
    with suppress(TimeoutError, Nobody):
        await copies.each(method, seconds=seconds)


def _write(pulse: dict[str, Any]) -> None:
    """Log what a replica logged, under its name."""
    if pulse["failure"]:
        log.error("a replica has no model", extra={"fields": {"replica": pulse["name"], "reason": pulse["failure"]}})
    for line in pulse["lines"]:
        sys.stderr.write(json.dumps({**json.loads(line), "replica": pulse["name"]}) + "\n")
