"""Running the application: a bound socket first, then the model, a `ready` line, and an orderly end on SIGTERM.

uvicorn closes its sockets as soon as it is told to stop, so the health check could not report that the server drains.
Here the first signal only starts the drain; uvicorn is told to stop when nothing runs any more. A second cuts it short.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any

import uvicorn

from server.app import create_app
from server.host import Service
from server.listen import url
from server.middleware import log_to_stderr
from server.settings import ServerSettings
from steering import SteeringError


def serve(settings: ServerSettings, listener: socket.socket) -> None:
    """Serve on a bound socket until a signal ends it. Raises what loading the model raises."""
    log_to_stderr()
    if settings.is_replicated:
        from server.replicas.fleet import RayFleet
        from server.replicas.portal import gateway

        app = gateway(settings, RayFleet(settings))
    else:
        app = create_app(settings, loads=False)
    # h11 bounds a request's headers; httptools, which uvicorn would take where it is installed, does not.
    parser: dict[str, Any] = {"http": "h11", "ws": "none", "server_header": False}
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=3, **parser
    )
    server = _Server(config, app.state.service)
    asyncio.run(server.run_until_drained(listener, url(listener)))


class _Server(uvicorn.Server):
    """uvicorn's server, which loads the model beside itself and drains before it stops."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._out = sys.stdout  # as it is now: a library may print later, and that goes elsewhere
        self._signals = 0
        self._signalled = asyncio.Event()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: drain; the second one stops at once. Not recorded, so that the process ends with code 0."""
        self._signals += 1
        self._signalled.set()

    async def run_until_drained(self, listener: socket.socket, address: str) -> None:
        """Serve, load, announce, drain. Raises what loading raised."""
        serving = asyncio.ensure_future(self.serve(sockets=[listener]))
        loading = asyncio.ensure_future(self._load(address))
        signalled = asyncio.ensure_future(self._signalled.wait())
        lost: asyncio.Future[SteeringError] = asyncio.get_running_loop().create_future()
        failure: BaseException | None = None
        try:
            await asyncio.wait((serving, loading, signalled), return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                failure = loading.exception()
            if failure is None and not serving.done():
                self._service.when_lost(partial(_tell, asyncio.get_running_loop(), lost))
                await asyncio.wait((serving, signalled, lost), return_when=asyncio.FIRST_COMPLETED)
                await self._service.drain(lambda: self._signals > 1 or lost.done())
                failure = lost.result() if lost.done() else None
        finally:
            self.should_exit = True
            await serving
            signalled.cancel()
            await asyncio.gather(loading, return_exceptions=True)
            await self._service.close()
        if failure is not None:
            raise failure

    async def _load(self, address: str) -> None:
        await self._service.load()
        while not self.started:
            await asyncio.sleep(0.01)
        print(f"ready {address}", flush=True, file=self._out)


def _tell(loop: asyncio.AbstractEventLoop, lost: asyncio.Future[SteeringError], error: SteeringError) -> None:
    """Have the event loop know of a loss that another thread found."""

    def set_() -> None:
        if not lost.done():
            lost.set_result(error)

    with suppress(RuntimeError):  # it has ended
        loop.call_soon_threadsafe(set_)
