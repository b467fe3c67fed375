"""One replica's answers as the gateway gets them: at once where one stream runs, gathered where there are many."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from server.replicas import replica
from server.replicas.copies import END
from server.settings import ServerSettings
from steering import PlantError
from tests.server.replicas.conftest import LocalReplica

PIECES = 40


@pytest.fixture
def one(monkeypatch: pytest.MonkeyPatch) -> LocalReplica:
    """A replica whose application streams numbers, one in five milliseconds."""

    def load(_: object) -> Any:
        raise PlantError("none is needed")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(PIECES):
            await send({"type": "http.response.body", "body": b"%d " % number, "more_body": True})
            await asyncio.sleep(0.005)
        await send({"type": "http.response.body", "body": b"end"})

    monkeypatch.setattr("server.host.Host.load", load)
    made = LocalReplica(ServerSettings(), 0)
    made._app = app  # type: ignore[assignment]
    return made


async def _read(made: LocalReplica) -> tuple[bytes, list[float]]:
    """The whole body, and when each piece of it came."""
    body, times = b"", []
    async for batch in made.call({"state": {}}, b""):
        kinds = [message["type"] for message in batch]
        assert kinds.count("http.response.body") <= 1
        assert END not in kinds[:-1]
        for message in batch:
            if "body" in message:
                body += message["body"]
                times.append(time.monotonic())
    return body, times


WHOLE = b"".join(b"%d " % number for number in range(PIECES)) + b"end"


def test_one_stream_alone_is_not_held(one: LocalReplica) -> None:
    body, times = asyncio.run(_read(one))
    assert body == WHOLE
    assert len(times) >= PIECES


def test_pieces_of_many_streams_are_gathered_and_nothing_is_lost(one: LocalReplica) -> None:
    async def all_() -> list[tuple[bytes, list[float]]]:
        return list(await asyncio.gather(*(_read(one) for _ in range(16))))

    for body, times in asyncio.run(all_()):
        assert body == WHOLE
        assert len(times) < PIECES / 2
    assert one._streams == 0


def test_neither_the_first_piece_nor_the_end_waits(one: LocalReplica, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "HELD", 20.0)
    monkeypatch.setattr(replica, "HELD_EACH", 20.0)

    async def both() -> list[tuple[bytes, list[float]]]:
        return list(await asyncio.gather(_read(one), _read(one)))

    began = time.monotonic()
    found = asyncio.run(both())
    assert time.monotonic() - began < 10
    for body, times in found:
        assert body == WHOLE
        assert times[0] - began < 1


def test_a_stream_that_is_left_counts_no_more(one: LocalReplica) -> None:
    async def leave() -> None:
        call = one.call({"state": {}}, b"")
        await anext(call)
        await anext(call)
        assert one._streams == 1
        await call.aclose()  # type: ignore[attr-defined]

    asyncio.run(leave())
    assert one._streams == 0
