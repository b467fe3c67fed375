"""A gateway over replicas that live in this process: the real application is behind it, and any of them can end."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.types import Message

from server.host import Host
from server.replicas.copies import Generation, Lost, Nobody
from server.replicas.portal import Portal, gateway
from server.replicas.replica import Replica
from server.settings import ServerSettings
from steering import Engine, EngineSettings, Store
from tests.server.conftest import tiny_plant


class Local:
    """`Copies` in this process. Calls go to the living ones in turn."""

    def __init__(self, replicas: list[Replica]) -> None:
        self.replicas = replicas
        self.dead: set[int] = set()
        self.calls: list[int] = []
        self.kill_at_call: int | None = None
        """Which call from now on ends the replica that takes it, before it says anything."""
        self.kill_all_after: float | None = None
        """Seconds after the next call at which none is left."""

    def living(self) -> list[int]:
        found = [index for index in range(len(self.replicas)) if index not in self.dead]
        if not found:
            raise Nobody
        return found

    async def call(self, scope: dict[str, Any], body: bytes) -> AsyncGenerator[list[Message], None]:
        if self.kill_all_after is not None:
            asyncio.get_running_loop().call_later(self.kill_all_after, self.dead.update, range(len(self.replicas)))
        living = self.living()
        index = living[len(self.calls) % len(living)]
        self.calls.append(index)
        if self.kill_at_call is not None:
            self.kill_at_call -= 1
            if self.kill_at_call < 0:
                self.kill_at_call = None
                self.dead.add(index)
                raise Lost
        async for batch in self.replicas[index].call(scope, body):
            if index in self.dead:
                raise Lost
            yield batch

    async def stream(self, method: str) -> AsyncGenerator[Any, None]:
        index = self.living()[0]
        async for item in getattr(self.replicas[index], method)():
            if index in self.dead:
                raise Lost
            yield item

    async def each(self, method: str, *arguments: object, seconds: float = 5.0) -> list[Any]:
        return [await getattr(self.replicas[index], method)(*arguments) for index in self.living()]


class LocalReplica(Replica):
    """A replica that has its number from a test."""

    def __init__(self, settings: ServerSettings, number: int) -> None:
        self._number = number
        super().__init__(settings, number < 0)

    def _rank(self) -> int:
        return self._number


@dataclass(eq=False)
class LocalFleet:
    """A `Fleet` of two replicas and a writer."""

    settings: ServerSettings
    generations: list[Generation] = field(default_factory=list)
    deleted: list[int] = field(default_factory=list)

    def start(self) -> None:
        """Nothing is needed."""

    def deploy(self) -> Generation:
        serving = Local([LocalReplica(self.settings, number) for number in range(2)])
        made = Generation(len(self.generations) + 1, serving, Local([LocalReplica(self.settings, -1)]))
        self.generations.append(made)
        return made

    def give_up(self) -> None:
        """Nothing takes long."""

    def delete(self, generation: Generation) -> None:
        self.deleted.append(generation.number)

    def stop(self) -> None:
        """Nothing was started."""


@dataclass
class Gateway:
    """A running gateway, and what is behind it."""

    client: httpx.Client
    fleet: LocalFleet
    portal: Portal
    url: str

    @property
    def serving(self) -> Local:
        found = self.fleet.generations[-1].serving
        assert isinstance(found, Local)
        return found

    @property
    def writing(self) -> Local:
        found = self.fleet.generations[-1].writing
        assert isinstance(found, Local)
        return found

    def running(self) -> float:
        """Requests that all engines run."""
        hosts = [replica._service.host for replica in self.serving.replicas]
        return sum(host.engine.stats().running for host in hosts if host is not None)


def until(is_so: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait for something. Fails when it does not come."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)


@contextmanager
def running(settings: ServerSettings) -> Iterator[Gateway]:
    """A gateway on a free port."""
    fleet = LocalFleet(settings)
    app = gateway(settings, fleet)
    app.state.loads = True
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        until(lambda: server.started, 60)
        try:
            with httpx.Client(base_url=url, timeout=30) as client:
                yield Gateway(client, fleet, app.state.service, url)
        finally:
            server.should_exit = True
            thread.join()
            for generation in fleet.generations:
                for replica in (*generation.serving.replicas, *generation.writing.replicas):  # type: ignore[attr-defined]
                    replica._service.jobs.close()
                    replica._service.host.engine.stop(0.0)


@pytest.fixture(autouse=True)
def _logs() -> Iterator[None]:
    """A replica takes the log over, which is right in a process of its own."""
    loggers = [logging.getLogger(name) for name in ("setpoint", "setpoint.request", "setpoint.job")]
    before = [(one, list(one.handlers), one.propagate, one.level) for one in loggers]
    yield
    for one, handlers, propagate, level in before:
        one.handlers, one.propagate = handlers, propagate
        one.setLevel(level)


@pytest.fixture
def gate(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    """A gateway in front of two tiny models and a writer, over a store of its own with the session's concept."""
    (tmp_path / "happy.safetensors").write_bytes((folder / "happy.safetensors").read_bytes())

    def load(settings: ServerSettings) -> Host:
        engine = Engine(plant := tiny_plant(), EngineSettings(max_batch=4))
        engine.start()
        return Host(plant, engine, Store(tmp_path), "tiny")

    monkeypatch.setattr(Host, "load", load)
    with running(ServerSettings(store=tmp_path, replicas=2, body_limit=100_000, drain_seconds=1)) as made:
        yield made
