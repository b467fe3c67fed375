"""A real process of `setpoint serve` for the benchmarks that go over HTTP, and what its `/metrics` say."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

END_SECONDS = 60.0
"""Longest wait for the process to end by itself."""


@dataclass
class Server:
    """A server that answers; once the block of `serving` is left, how it ended and what it logged of exceptions."""

    address: str
    code: int | None = None
    failures: list[str] = field(default_factory=list)


@contextmanager
def serving(model: str | None, options: Sequence[str]) -> Iterator[Server]:
    """Serve a model, the embedded one without it, on a free port with an empty store, until the block ends."""
    command = [sys.executable, "-m", "server", "serve", *([model] if model else []), "--port", "0", *options]
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+") as log:
        environment = os.environ | {"SETPOINT_STORE": f"{folder}/store"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        try:
            assert process.stdout is not None
            ready = process.stdout.readline().split()
            if not ready:
                log.seek(0)
                raise RuntimeError(f"the server did not start: {log.read()[-500:]}")
            server = Server(ready[1])
            yield server
            process.send_signal(signal.SIGTERM)
            server.code = process.wait(timeout=END_SECONDS)
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        server.failures = [line[:500] for line in log if '"exception"' in line or "Traceback" in line]


async def figures(http: httpx.AsyncClient) -> dict[str, float]:
    """Samples without labels, the prefix left out."""
    text = (await http.get("/metrics")).raise_for_status().text
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {sample.name.removeprefix("setpoint_"): sample.value for sample in samples if not sample.labels}
