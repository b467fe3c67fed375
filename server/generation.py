"""From the engine's thread to the event loop: the requests of one HTTP call as one stream of events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial

from fastapi import Request as HttpRequest
from starlette.types import Receive

from server.metrics import Metrics, Watch
from server.schema.errors import ApiError, from_steering
from steering import AnyEngine, Delta, Diverged, Finished, Request, SpecError, SteeringError


class Generation:
    """Requests that are submitted together, deliver into one stream, and are aborted together.

    `metrics` are told how long each request waited, and how fast its tokens came.
    """

    def __init__(
        self, engine: AnyEngine, requests: Sequence[Request], done: Callable[[Generation], None], metrics: Metrics
    ) -> None:
        self._engine = engine
        self._watches = [Watch(metrics) for _ in requests]
        self._requests = list(requests)
        self._done = done
        self._open = {request.id for request in requests}
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Delta | Finished]] = asyncio.Queue()

    @property
    def running(self) -> list[Request]:
        """The requests that have not ended."""
        return [request for request in self._requests if request.id in self._open]

    def start(self) -> None:
        """Submit all. When one is refused those before it are aborted. Raises QueueFull, PlantError."""
        try:
            for index, request in enumerate(self._requests):
                self._engine.submit(request, partial(self._deliver, index))
        except BaseException as error:
            self.close()
            if isinstance(error, SpecError) and (error.param or "").startswith("guard"):  # of a whole program
                error.at("steering")
            raise

    def _deliver(self, index: int, event: Delta | Finished) -> None:
        """Called in the engine's thread."""
        self._watches[index].see(event)
        self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))

    async def events(self) -> AsyncIterator[tuple[int, Delta | Finished]]:
        """Events with the index of their request, until every request has ended. Raises ApiError where one failed."""
        while self._open:
            index, event = await self._queue.get()
            if isinstance(event, Finished):
                self._open.discard(event.request_id)
                if failure := _failure(event):
                    raise failure
            yield index, event

    async def finished(self, http: HttpRequest) -> list[Finished]:
        """Every request's end, in order. A client that goes away aborts them. Raises ApiError where one failed."""
        leaving = asyncio.ensure_future(left(http.receive))
        ends: dict[int, Finished] = {}
        try:
            collecting = asyncio.ensure_future(self._collect(ends))
            await asyncio.wait((leaving, collecting), return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                collecting.cancel()
                raise ApiError(499, "The client closed the connection.", code="client_closed")
            collecting.result()
            return [ends[index] for index in range(len(self._requests))]
        finally:
            leaving.cancel()
            self.close()

    async def _collect(self, ends: dict[int, Finished]) -> None:
        ends |= {index: event async for index, event in self.events() if isinstance(event, Finished)}

    def abort(self) -> None:
        """End what still runs; its `Finished` events follow."""
        for id_ in tuple(self._open):
            self._engine.abort(id_)

    def close(self) -> None:
        """Abort what still runs and forget it. May be called twice."""
        self.abort()
        self._done(self)


async def left(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _failure(end: Finished) -> ApiError | None:
    """The error of a request that did not end by itself."""
    if end.reason == "abort":
        return ApiError(503, "The request was aborted because the server is shutting down.", code="aborted")
    if end.reason != "error":
        return None
    error = end.error or SteeringError("The request failed.")
    if error.param == "schema":  # what a grammar says of itself
        error.at("response_format.json_schema")
    if isinstance(error, Diverged) and not (error.param or "").startswith("steering"):
        error.param = "steering"
    return from_steering(error)
