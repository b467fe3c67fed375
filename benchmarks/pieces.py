"""What a token of a stream costs the gateway and a replica, with and without gathering: 16 streams over Ray Serve.

    PYTHON -m benchmarks.pieces        with Ray in PYTHON's environment; prints JSON

The replica's own code passes on what an application without a model makes, a token every 8 ms in each stream, about as
fast as a GPU makes those of an 8B model. CPU seconds of each process, divided by the tokens, and how many tokens a
piece brings.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

STREAMS, TOKENS, STEP, REPEATS = 16, 200, 0.008, 4
EVENT = b'data: {"id":"chatcmpl-0","object":"chat.completion.chunk","created":0,"model":"m","choices":[{"index":0,' + (
    b'"delta":{"content":" word"},"finish_reason":null}]}\n\n'
)


async def _application(scope: Any, receive: Any, send: Any) -> None:
    head = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    due = time.monotonic()
    for _ in range(TOKENS):
        await send({"type": "http.response.body", "body": EVENT, "more_body": True})
        due += STEP
        await asyncio.sleep(due - time.monotonic())
    await send({"type": "http.response.body", "body": b""})


class Source:
    """A replica without a model."""

    def __init__(self, is_gathering: bool) -> None:
        from server.replicas import replica

        self._made = made = object.__new__(replica.Replica)
        made._app, made._place, made._tasks, made._streams = _application, "", set(), 0  # type: ignore[assignment]
        if not is_gathering:
            replica.HELD = 0.0

    async def call(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[Any]:
        """As `Replica.call`."""
        async for batch in self._made.call(scope, body):
            yield batch

    def cpu(self) -> float:
        """CPU seconds of this process."""
        return time.process_time()


async def _measured(handle: Any) -> dict[str, float]:
    from server.replicas.fleet import RayCopies

    pieces = 0

    async def one() -> int:
        nonlocal pieces
        size = 0
        async for batch in RayCopies(handle).call({"state": {}}, b""):
            sent = [message["body"] for message in batch if message.get("body")]
            pieces += len(sent)
            size += sum(map(len, sent))
        return size // len(EVENT)

    gateway, replica = [], []
    for index in range(REPEATS + 1):
        theirs, ours, pieces = await handle.cpu.remote(), time.process_time(), 0
        tokens = sum(await asyncio.gather(*(one() for _ in range(STREAMS))))
        if tokens != STREAMS * TOKENS:
            raise RuntimeError(f"{STREAMS * TOKENS - tokens} tokens were lost")
        if index:  # the first one warms up
            gateway.append((time.process_time() - ours) / tokens)
            replica.append((await handle.cpu.remote() - theirs) / tokens)
    return {
        "gateway_us": round(1e6 * statistics.median(gateway), 1),
        "replica_us": round(1e6 * statistics.median(replica), 1),
        "tokens_a_piece": round(tokens / pieces, 2),
    }


def main() -> None:
    """Start Ray here, measure both, print, end it."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0"}
    import ray
    from ray import serve

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    found: dict[str, Any] = {"streams": STREAMS, "step_ms": 1e3 * STEP, "ray": ray.__version__}
    try:
        serve.start(proxy_location="Disabled")
        for is_gathering in (False, True):
            made = serve.deployment(Source, max_ongoing_requests=4 * STREAMS, ray_actor_options={"num_cpus": 0.1})
            handle = serve.run(made.bind(is_gathering), name="pieces", route_prefix=None)
            found["gathered" if is_gathering else "each"] = asyncio.run(_measured(handle))
        serve.shutdown()
    finally:
        ray.shutdown()
    sys.stdout.write(f"\n{json.dumps(found)}\n")


if __name__ == "__main__":
    main()
