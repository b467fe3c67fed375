"""One copy of the model in a process of its own: the application of `server.app`, called by the gateway over Ray.

Keys and the log of requests are the gateway's; limits, errors and everything behind the routes are decided here, by the
same code as in a server of one process. What is logged here is kept until the gateway asks.
"""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from starlette.types import Message

from server.account import Json
from server.app import create_app
from server.host import Host, Service
from server.middleware import JsonLines
from server.replicas.copies import END
from server.replicas.exposition import Family, families
from server.settings import ServerSettings
from steering import SteeringError

HELD = 0.05
"""Seconds between two pieces of a stream, at most, for which tokens are gathered: a piece costs the gateway the same
with one token or ten."""
HELD_EACH = 0.002
"""What each other stream of this process adds to that: one alone is not held."""
KEPT_LINES = 1000
"""Log lines that wait for the gateway; the oldest give way."""
WRITER = "writer"


class Replica:
    """The model, its engine and the application. A model that cannot be loaded is told at the next pulse."""

    def __init__(self, settings: ServerSettings, is_writer: bool) -> None:
        self._place = uuid.uuid4().hex
        self._is_writer = is_writer
        self._lines = _Lines()
        self._failure: str | None = None
        self._is_told = self._is_cut = False
        self._service = Service(settings)
        try:
            self._service.host = Host.load(settings)
        except SteeringError as error:
            self._failure = error.message
        self._service.when_lost(self._lose)
        self._app = create_app(settings, service=self._service, loads=False)
        self._tasks: set[asyncio.Task[None]] = set()
        self._streams = 0

    async def call(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[list[Message]]:
        """One HTTP request: its ASGI messages in batches. Closing this is the client's going away."""
        messages: asyncio.Queue[Message] = asyncio.Queue()
        coming, left = [body], asyncio.Event()

        async def receive() -> Message:
            if coming:
                return {"type": "http.request", "body": coming.pop(), "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            messages.put_nowait(message)

        async def run() -> None:
            is_whole = False
            try:
                await self._app(scope, receive, send)
                is_whole = True
            except Exception:  # half an answer is out, and the application has logged it
                pass
            finally:
                state = scope["state"]
                told = {name: state[name] for name in ("notes", "error") if name in state}
                if made := told.get("notes", {}).get("job"):
                    told["job"] = self._service.jobs.get(made).to_json()
                messages.put_nowait({"type": END, "whole": is_whole, "place": self._place, **told})

        task = asyncio.ensure_future(run())
        self._tasks.add(task)  # the loop holds tasks weakly, and this one outlives a client that leaves
        task.add_done_callback(self._tasks.discard)
        clock, is_stream, sent = asyncio.get_running_loop().time, False, 0.0
        try:
            while True:
                batch = [await messages.get()]
                held = min(HELD, HELD_EACH * (self._streams - 1)) if is_stream else 0.0
                if held and (rest := sent + held - clock()) > 0:
                    await asyncio.wait((task,), timeout=rest)
                while not messages.empty():
                    batch.append(messages.get_nowait())
                yield _joined(batch)
                sent = clock()
                if batch[-1]["type"] == END:
                    return
                if not is_stream and batch[-1].get("more_body"):
                    is_stream = True
                    self._streams += 1
        finally:
            self._streams -= is_stream
            left.set()

    async def journal(self) -> AsyncIterator[Json]:
        """Where this is, then every job as it is now, then every change, for as long as somebody reads."""
        yield {"place": self._place}
        async for document in self._service.jobs.watch_all():
            yield {"place": self._place, "job": document}

    async def pulse(self) -> dict[str, Any]:
        """How this process is, and the log lines since the last time."""
        self._is_told = self._failure is not None
        return {"name": self._name(), "pid": os.getpid(), "failure": self._failure, "lines": self._lines.take()}

    async def metrics(self) -> tuple[str, list[Family]]:
        """Under which label, and what was measured."""
        return self._name(), await asyncio.to_thread(families, self._service.metrics.registry)

    async def uses(self, artifact: str) -> bool:
        """Whether a running request is steered by an artifact."""
        return self._service.runs_with(artifact)

    async def drain(self) -> None:
        """Refuse new calls, and let those that run finish within the settings' time."""
        await self._service.drain(lambda: self._is_cut)

    async def cut(self) -> None:
        """End the drain at once."""
        self._is_cut = True

    def check_health(self) -> None:
        """Asked by Ray Serve. Raises once it is told why this copy is of no use; another one is then started."""
        if self._is_told:
            raise RuntimeError(self._failure)

    def _lose(self, error: SteeringError) -> None:
        """The processes that share this copy of the model are no longer together."""
        self._service.is_draining = True
        self._failure = error.message

    def _name(self) -> str:
        """`writer`, or the number of this copy: of as many values as there are copies."""
        return WRITER if self._is_writer else str(self._rank())

    def _rank(self) -> int:
        """The number of this copy among those that serve."""
        raise NotImplementedError


def _joined(batch: list[Message]) -> list[Message]:
    """The same with consecutive pieces of a body as one."""
    found: list[Message] = []
    for message in batch:
        if found and message["type"] == found[-1]["type"] == "http.response.body":
            found[-1] = {**message, "body": found[-1].get("body", b"") + message.get("body", b"")}
        else:
            found.append(message)
    return found


class _Lines(logging.Handler):
    """Log lines of this package, in place of stderr. One line a request, and one a job, is the gateway's to write."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: deque[str] = deque(maxlen=KEPT_LINES)
        self.setFormatter(JsonLines())
        logger = logging.getLogger("setpoint")
        logger.handlers, logger.propagate = [self], False
        for name in ("setpoint.request", "setpoint.job"):
            logging.getLogger(name).setLevel(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one line."""
        self._kept.append(self.format(record))

    def take(self) -> list[str]:
        """The lines since the last time."""
        return [self._kept.popleft() for _ in range(len(self._kept))]
