"""Server-sent events: framing, a client that goes away, and errors after the response has begun."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.generation import Generation, left
from server.schema.errors import ApiError

DONE = b"data: [DONE]\n\n"


def frame(document: Mapping[str, Any]) -> bytes:
    """One event. JSON has no line feeds outside of strings, and there they are escaped."""
    return (
        b"data: " + json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"
    )


class EventStream(Response):
    """Sends documents as events, then `[DONE]`.

    A client that goes away ends the generation at once: the connection is watched while the next document is awaited.
    An error becomes an event of its own before `[DONE]`.
    """

    media_type = "text/event-stream"

    def __init__(self, documents: AsyncIterator[Mapping[str, Any]], generation: Generation) -> None:
        self.status_code = 200
        self.background = None
        self.body = b""
        self._documents = documents
        self._generation = generation
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the documents or the client end, whichever is first."""
        sending = asyncio.ensure_future(self._send(scope, send))
        leaving = asyncio.ensure_future(left(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
            self._generation.close()

    async def _send(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for document in self._documents:
                await _event(send, frame(document))
        except ApiError as error:
            scope["state"]["error"] = error.code
            await _event(send, frame(error.body()))
        except Exception:
            logging.getLogger("setpoint").exception("a stream failed")
            await _event(send, frame(ApiError(500, "The server failed to answer.", code="internal_error").body()))
        await send({"type": "http.response.body", "body": DONE, "more_body": False})


async def _event(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})
