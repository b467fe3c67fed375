"""Around every request: an id, the API key, an answer whatever fails, one line of log.

Plain ASGI, so that disconnects pass through.
"""

from __future__ import annotations

import hmac
import json
import logging
import re
import sys
import time
import uuid
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.schema.errors import ApiError

log = logging.getLogger("setpoint.request")
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_PATH_LIMIT = 200


class Gate:
    """Gives each request its id (the client's `X-Request-Id`, or a new one), checks the API key, logs the outcome."""

    def __init__(self, app: ASGIApp, api_key: str | None = None) -> None:
        self._app = app
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()

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
            if self._admits(scope["path"], headers.get(b"authorization", b"")):
                await self._app(scope, receive, answer)
            else:
                error = ApiError(401, "Expected the header Authorization: Bearer <API key>.", code="invalid_api_key")
                await JSONResponse(error.body(), 401, {"WWW-Authenticate": "Bearer"})(scope, receive, answer)
        except Exception as error:
            logging.getLogger("setpoint").error(
                "a request failed", exc_info=error, extra={"fields": {"request_id": id_}}
            )
            state["error"] = "internal_error"
            if status:  # half an answer is out: only a broken connection can say so
                raise
            failed = ApiError(500, "The server failed to answer; its log says why.", code="internal_error")
            await JSONResponse(failed.body(), 500)(scope, receive, answer)
        finally:
            log.info("request", extra={"fields": _line(scope, state, id_, status or 500, time.perf_counter() - began)})

    def _admits(self, path: str, given: bytes) -> bool:
        if self._expected is None or path == "/health" or path.startswith("/health/"):
            return True
        return hmac.compare_digest(given, self._expected)


def _line(scope: Scope, state: dict[str, Any], id_: str, status: int, seconds: float) -> dict[str, Any]:
    notes = {f"call_{name}" if name == "id" else name: value for name, value in state.get("notes", {}).items()}
    error = {"error": state["error"]} if "error" in state else {}
    return {
        "request_id": id_,
        "method": scope["method"],
        "path": scope["path"][:_PATH_LIMIT],
        "status": status,
        "seconds": round(seconds, 4),
        **notes,
        **error,
    }


class JsonLines(logging.Formatter):
    """One JSON object a record; a record's `fields` are its own keys."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {"time": round(record.created, 3), "level": record.levelname.lower(), "event": record.getMessage()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps({**line, **getattr(record, "fields", {})}, ensure_ascii=False, default=str)


def log_to_stderr() -> None:
    """Structured logs of this package and of uvicorn's errors on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in (("setpoint", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
