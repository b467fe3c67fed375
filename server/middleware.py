"""Around every request: an id, the keys, a clock on the body, an answer whatever fails, one line of log.

Plain ASGI, so that disconnects pass through.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sys
import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.access import HEALTH, Access
from server.schema.errors import ApiError

log = logging.getLogger("setpoint.request")
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_PATH_LIMIT = 200
_METHOD_LIMIT = 20


class Gate:
    """Gives each request its id (the client's `X-Request-Id`, or a new one), checks its key, logs the outcome.

    OPTIONS, with which a browser asks whether another site's page may call, is refused except for the health checks,
    and no answer has a header that would allow it. `answered` is told the pattern of the address and the status of each
    answer, `body_seconds` is how long a body may pause.
    """

    def __init__(
        self,
        app: ASGIApp,
        access: Access | None = None,
        answered: Callable[[str | None, int], None] = lambda route, status: None,
        body_seconds: float = 30.0,
    ) -> None:
        self._app = app
        self._access = access or Access()
        self._answered = answered
        self._body_seconds = body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request. Anything but HTTP passes."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        id_ = headers.get(b"x-request-id", b"").decode("latin-1")
        if not _ID.fullmatch(id_):
            id_ = f"req-{uuid.uuid4().hex}"
        state = scope.setdefault("state", {})
        state["request_id"] = id_
        began, status = time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", id_.encode())]
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, self._timed(receive), answer)
        except Exception as error:
            refusal = error if isinstance(error, ApiError) else _unexpected(error, id_)
            state["error"] = refusal.code
            if status:  # half an answer is out: only a broken connection can say so
                raise
            await JSONResponse(refusal.body(), refusal.status, refusal.headers)(scope, receive, answer)
        finally:
            self._answered(getattr(scope.get("route"), "path", None), status or 500)
            log.info("request", extra={"fields": _line(scope, state, id_, status or 500, time.perf_counter() - began)})

    def _check(self, scope: Scope) -> None:
        """Raises ApiError for a call that may not be made, or whose end a proxy on the way may have seen elsewhere: the
        parser lets Transfer-Encoding win over a Content-Length and goes on with the connection."""
        if {b"content-length", b"transfer-encoding"} <= {name for name, _ in scope["headers"]}:
            raise ApiError(
                400,
                "Expected Content-Length or Transfer-Encoding, not both.",
                code="invalid_framing",
                headers={"Connection": "close"},
            )
        if scope["method"] == "OPTIONS" and scope["path"] not in HEALTH:
            raise ApiError(405, "This address does not take OPTIONS.", code="method_not_allowed")
        self._access.check(scope["method"], scope["path"], scope["headers"])

    def _timed(self, receive: Receive) -> Receive:
        """`receive`, which raises ApiError 408 when the body pauses for too long. After the body it waits for ever."""
        is_whole = False

        async def timed() -> Message:
            nonlocal is_whole
            if is_whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self._body_seconds)
            except TimeoutError as error:
                raise ApiError(
                    408,
                    f"The body paused for more than {self._body_seconds:g} s.",
                    code="body_timeout",
                    headers={"Connection": "close"},
                ) from error
            is_whole = not message.get("more_body", False)
            return message

        return timed


def _unexpected(error: Exception, id_: str) -> ApiError:
    """Log a defect of ours in full; what the client is told of it says nothing."""
    logging.getLogger("setpoint").error("a request failed", exc_info=error, extra={"fields": {"request_id": id_}})
    return ApiError(500, "The server failed to answer; its log says why.", code="internal_error")


def _line(scope: Scope, state: dict[str, Any], id_: str, status: int, seconds: float) -> dict[str, Any]:
    notes = {f"call_{name}" if name == "id" else name: value for name, value in state.get("notes", {}).items()}
    error = {"error": state["error"]} if "error" in state else {}
    return {
        "request_id": id_,
        "method": scope["method"][:_METHOD_LIMIT],
        "path": scope["path"][:_PATH_LIMIT],
        "status": status,
        "seconds": round(seconds, 4),
        **notes,
        **error,
    }


class JsonLines(logging.Formatter):
    """One JSON object a record, in ASCII: nothing in it can steer a terminal. A record's `fields` are its own keys."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {"time": round(record.created, 3), "level": record.levelname.lower(), "event": record.getMessage()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps({**line, **getattr(record, "fields", {})}, default=str)


class _Stderr(logging.StreamHandler[Any]):
    """Writes to what `sys.stderr` is at the time, which an embedding program may have replaced and closed."""

    @property
    def stream(self) -> Any:
        """The stream."""
        return sys.stderr

    @stream.setter
    def stream(self, _: Any) -> None:
        """Set by the base class; not kept."""


def log_to_stderr() -> None:
    """Structured logs of this package and of uvicorn's errors on stderr."""
    handler = _Stderr()
    handler.setFormatter(JsonLines())
    for name, level in (("setpoint", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
