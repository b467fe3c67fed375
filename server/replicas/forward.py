"""The gateway's part of a call: read the body, hand both to a replica, pass on what it answers.

A replica that ends before anything was sent is replaced by another one, once, for calls that only read or generate. One
that ends in the middle of a stream ends it with an error event. What a replica answers whole is held back until it is
whole, so that an answer never breaks off.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, nullcontext
from typing import Any

from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.access import HEALTH, writes
from server.generation import left
from server.replicas.copies import END, Busy, Copies, Generation, Lost, Nobody
from server.replicas.portal import Portal
from server.routes.jobs import EXAMPLES_BYTES
from server.schema.errors import ApiError
from server.stream import DONE, frame
from steering.artifact import MAX_BYTES

JOBS = "/v1/steering/jobs"
FIT = "/v1/steering/fit"
ARTIFACTS = "/v1/steering/artifacts/"
OWN = frozenset({*HEALTH, "/version", "/openapi.json", "/v1/steering/types"})
"""Answered by the gateway: nothing there needs a model."""
IN_MEMORY = 2**20
"""Bytes of a body that are kept in memory while it arrives; a longer one waits in a file."""
PATIENCE = 1.0
"""Seconds between two looks at whether anybody is left who could answer."""


class Forward:
    """Innermost middleware of the gateway's application. What needs no replica, and what there is none for, goes on to
    the application's own routes."""

    def __init__(self, app: ASGIApp, portal: Portal, routes: list[BaseRoute]) -> None:
        self._app = app
        self._portal = portal
        self._routes = routes
        self._large = asyncio.Semaphore(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One call."""
        path, method = scope.get("path", ""), scope.get("method", "")
        if scope["type"] != "http" or path in OWN:
            await self._app(scope, receive, send)
        elif path == "/metrics" and method == "GET":
            await self._metrics(scope, send)
        elif path == JOBS or path.startswith(f"{JOBS}/"):
            await self._job(scope, receive, send)
        elif self._portal.state == "ready" and (route := self._route(scope)) is not None:
            scope["route"] = route  # under which the answer is counted
            await self._to(scope, receive, send, None)
        else:
            await self._app(scope, receive, send)

    def _route(self, scope: Scope) -> BaseRoute | None:
        """The application's route for a call; None where there is no such address, or not with this method."""
        return next((route for route in self._routes if route.matches(scope)[0] == Match.FULL), None)

    async def _metrics(self, scope: Scope, send: Send) -> None:
        accept = next((value for name, value in scope["headers"] if name == b"accept"), b"").decode("latin-1")
        body, content_type = await self._portal.exposition(accept)
        scope["route"] = self._route(scope)
        headers = [(b"content-type", content_type.encode()), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _job(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Jobs are read in the gateway's ledger; one that goes on is cancelled where it runs."""
        place = self._portal.ledger.place_of(scope["path"].removeprefix(f"{JOBS}/"))
        copies = None if place is None else self._portal.places.get(place)
        if scope["method"] != "DELETE" or copies is None:
            await self._app(scope, receive, send)
            return
        scope["route"] = self._route(scope)
        await self._to(scope, receive, send, copies)

    async def _to(self, scope: Scope, receive: Receive, send: Send, copies: Copies | None) -> None:
        """Read the body and answer from a replica; or from `copies`, where only they can."""
        portal = self._portal
        async with self._body(scope, receive) as (body, is_whole):
            generation = portal.enter()
            answer = _Answer(scope, send)
            try:
                answering = asyncio.ensure_future(self._answer(scope, body, answer, copies, generation))
                leaving = asyncio.ensure_future(left(receive) if is_whole else asyncio.sleep(float("inf")))
                try:
                    await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
                    if answering.done() or answer.is_over:  # after which "left" says nothing
                        await answering
                    elif not answer.is_begun:
                        raise ApiError(499, "The client closed the connection.", code="client_closed")
                finally:
                    for task in (answering, leaving):
                        task.cancel()
                    await asyncio.gather(answering, leaving, return_exceptions=True)
            finally:
                portal.leave(generation)

    @asynccontextmanager
    async def _body(self, scope: Scope, receive: Receive) -> AsyncIterator[tuple[bytes, bool]]:
        """The body, and whether it was read to its end. Of one that is too long so much that the replica refuses it."""
        limit = self._limit(scope)
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
        if declared.isdigit() and int(declared) > limit:
            yield b"", False
            return
        with tempfile.SpooledTemporaryFile(IN_MEMORY) as file:
            size, more = 0, True
            while more and size <= limit:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError(499, "The client closed the connection.", code="client_closed")
                file.write(message.get("body", b""))
                size += len(message.get("body", b""))
                more = message.get("more_body", False)
            file.seek(0)
            if size <= IN_MEMORY:
                yield file.read(), not more
                return
            # Of files for the store one at a time is in memory, however many are sent.
            async with self._large if writes(scope["method"], scope["path"]) else nullcontext():
                yield await asyncio.to_thread(file.read, limit + 1), not more

    def _limit(self, scope: Scope) -> int:
        settings = self._portal.settings
        if scope["method"] == "PUT" and scope["path"].startswith(ARTIFACTS):
            return min(settings.upload_limit, MAX_BYTES)
        return max(settings.body_limit, EXAMPLES_BYTES) if scope["path"] == FIT else settings.body_limit

    async def _answer(
        self, scope: Scope, body: bytes, answer: _Answer, copies: Copies | None, generation: Generation
    ) -> None:
        """The call and its answer. Raises ApiError where there is none."""
        portal = self._portal
        method, path = scope["method"], scope["path"]
        is_write = writes(method, path)
        asked = _asked(scope)
        if copies is None:
            copies = generation.writing if is_write else generation.serving
            if method == "DELETE" and path.startswith(ARTIFACTS):
                asked["state"]["is_used"] = await portal.is_used(path.removeprefix(ARTIFACTS))
        for tries_left in (0,) if is_write else (1, 0):
            try:
                async with aclosing(self._batches(copies, asked, body, is_write)) as batches:
                    async for batch in batches:
                        for message in batch:
                            if message["type"] == END and message["whole"]:
                                self._note(scope, answer, message, copies)  # before the client can ask after its job
                            await answer.take(message)
                if not answer.is_over:
                    raise Lost
            except (Lost, ApiError) as error:
                if answer.is_begun:
                    await answer.break_off()
                elif isinstance(error, ApiError):
                    raise
                elif tries_left:
                    answer.forget()
                    copies = portal.generation.serving  # which a rolling restart may have replaced
                    continue
                else:
                    raise _lost(is_write) from error
            return

    async def _batches(
        self, copies: Copies, asked: dict[str, Any], body: bytes, is_write: bool
    ) -> AsyncGenerator[list[Message], None]:
        """What a replica answers. Raises Lost, and ApiError when there is nobody who could answer, or no room."""
        try:
            async with aclosing(copies.call(asked, body)) as batches:
                coming = asyncio.ensure_future(anext(batches, None))
                try:
                    while True:
                        await asyncio.wait((coming,), timeout=PATIENCE)
                        if not coming.done():
                            if self._portal.is_deserted(copies):
                                raise Lost if is_write else Nobody  # a write may have been carried out
                            continue
                        batch = coming.result()
                        if batch is None:
                            return
                        yield batch
                        coming = asyncio.ensure_future(anext(batches, None))
                finally:
                    coming.cancel()
                    await asyncio.gather(coming, return_exceptions=True)
        except Nobody as error:
            self._portal.metrics.refused("loading")
            raise ApiError(
                503, "No replica is ready; try again later.", code="loading", headers={"Retry-After": "1"}
            ) from error
        except Busy as error:
            self._portal.metrics.refused("queue_full")
            raise ApiError(
                429, "Every replica is full: try again later.", code="queue_full", headers={"Retry-After": "1"}
            ) from error

    def _note(self, scope: Scope, answer: _Answer, end: Message, copies: Copies) -> None:
        """Count what a replica refused, and remember the job that it has queued or is ending."""
        self._portal.metrics.refused(end.get("error"))
        if "job" in end:
            self._portal.places.setdefault(end["place"], copies)
            self._portal.ledger.learn(end["job"], end["place"])
        elif scope["path"].startswith(f"{JOBS}/") and 200 <= answer.status < 300:
            self._portal.ledger.learn(json.loads(answer.body), end["place"])


class _Answer:
    """What a replica answers, passed on: an event stream as it comes, all else when it is whole."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope = scope
        self._send = send
        self._keeps = scope["path"].startswith(f"{JOBS}/")
        self._held: list[Message] = []
        self._is_stream = False
        self.status = 0
        self.body = b""
        """Of an answer about a job."""
        self.is_begun = False
        self.is_over = False

    async def take(self, message: Message) -> None:
        """One message, or the END. Raises Lost for an answer that has no end."""
        kind = message["type"]
        if kind == END:
            if not message["whole"]:
                raise Lost
            self._scope["state"].update({name: message[name] for name in ("notes", "error") if name in message})
            await self._flush()
            return
        if kind == "http.response.start":
            self.status = message["status"]
            headers = [(name, value) for name, value in message["headers"] if name != b"x-request-id"]
            message = {**message, "headers": headers}
            self._is_stream = any(name == b"content-type" and b"event-stream" in value for name, value in headers)
        elif not self._is_stream and self._keeps:
            self.body += message.get("body", b"")
        self._held.append(message)
        if self._is_stream and kind == "http.response.body":  # the start alone is no token yet
            await self._flush()

    async def break_off(self) -> None:
        """End a stream whose replica is gone."""
        if self.is_over:
            return
        error = _lost(False)
        self._scope["state"]["error"] = error.code
        self.is_over = True
        for data, more in ((frame(error.body()), True), (DONE, False)):
            await self._send({"type": "http.response.body", "body": data, "more_body": more})

    def forget(self) -> None:
        """Begin again: nothing was sent yet."""
        self._held, self.body = [], b""

    async def _flush(self) -> None:
        held, self._held = self._held, []
        for message in held:
            self.is_begun = True
            self.is_over = message["type"] == "http.response.body" and not message.get("more_body", False)
            await self._send(message)


def _asked(scope: Scope) -> dict[str, Any]:
    """The scope as another process needs it. The key has been checked, and stays here."""
    id_ = scope["state"]["request_id"].encode()
    hidden = (b"authorization", b"x-request-id")
    headers = [(name, value) for name, value in scope["headers"] if name not in hidden]
    kept = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path")
    return {
        **{name: scope[name] for name in kept if name in scope},
        "asgi": {"version": "3.0"},
        "headers": [*headers, (b"x-request-id", id_)],
        "client": None,
        "server": None,
        "state": {},
    }


def _lost(is_write: bool) -> ApiError:
    """The error for a call whose replica has ended."""
    advice = "whether it was carried out is not known: look before you send it again" if is_write else "send it again"
    message = f"The replica that worked on this call ended; {advice}."
    return ApiError(503, message, code="replica_lost", headers={"Retry-After": "1"})
