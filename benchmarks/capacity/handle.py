"""What a piece of a stream costs through a Ray Serve handle: one deployment that yields, one process that reads.

    PYTHON -m benchmarks.capacity.handle        with Ray in PYTHON's environment; prints JSON

CPU seconds of a piece in the process that reads (a gateway) and in the one that yields (a replica), each its own
median. Pieces of a stream come a step apart, so that none is sent together with the next.
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

STREAMS, ROUNDS, GAP, REPEATS = 16, 100, 0.02, 4
PIECE = b" " * 160


async def _through(handle: Any) -> dict[str, Any]:
    async def one() -> int:
        return len([piece async for piece in handle.options(stream=True).remote(ROUNDS)])

    reads, yields = [], []
    for index in range(REPEATS + 1):
        theirs, ours = await handle.cpu.remote(), time.process_time()
        n = sum(await asyncio.gather(*(one() for _ in range(STREAMS))))
        if index:  # the first one warms up
            reads.append((time.process_time() - ours) / n)
            yields.append((await handle.cpu.remote() - theirs) / n)
    return {"streams": STREAMS, "read_seconds": statistics.median(reads), "yield_seconds": statistics.median(yields)}


def main() -> None:
    """Start Ray here, measure, print, end it."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0"}
    import ray
    from ray import serve

    @serve.deployment(max_ongoing_requests=4 * STREAMS, ray_actor_options={"num_cpus": 0.1})
    class Source:
        async def __call__(self, n: int) -> AsyncIterator[bytes]:
            for _ in range(n):
                await asyncio.sleep(GAP)
                yield PIECE

        def cpu(self) -> float:
            return time.process_time()

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    try:
        serve.start(http_options={"location": "NoServer"})
        found = asyncio.run(_through(serve.run(Source.bind(), name="pieces", route_prefix=None)))
        serve.shutdown()
    finally:
        ray.shutdown()
    sys.stdout.write(f"\n{json.dumps({'ray': ray.__version__, **found})}\n")


if __name__ == "__main__":
    main()
