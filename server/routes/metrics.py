"""`/metrics`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.metrics import Metrics

router = APIRouter(tags=["Operation"])


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def metrics(http: Request) -> Response:
    """The server's metrics for Prometheus; needs the API key when one is set."""
    found: Metrics = http.app.state.service.metrics
    body, content_type = found.exposition(http.headers.get("accept", ""))
    return Response(body, media_type=content_type)
