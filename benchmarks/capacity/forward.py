"""The least that passing on a piece of a stream costs: a process that forwards events and does nothing else.

Three processes on this machine: a source that writes pieces in rounds, one to each of its streams, as a step of the
engine does; the forwarder between; and this one, which reads. The forwarder runs uvicorn with an ASGI application that
reads HTTP from the source through asyncio's streams, so it pays what every gateway in Python pays: one wake-up to read
and one call to write per piece. Its CPU time is divided by the pieces. A gateway that also counts, authenticates or
crosses an actor's handle pays that on top. With a path of HAProxy that takes the forwarder's place, for comparison.
"""

from __future__ import annotations

import asyncio
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

STREAMS, ROUNDS = 64, 200
GAP = 0.02
"""Seconds between rounds: pieces come a step apart, so that none can be read together with the next."""
EVENT = b'data: {"id":"chatcmpl-0","object":"chat.completion.chunk","created":0,"model":"m","choices":[{"index":0,' + (
    b'"delta":{"content":" word"},"finish_reason":null}]}\n\n'
)


async def source(scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Callable[..., Any]) -> None:
    """An ASGI application that streams ROUNDS events, one a GAP."""
    await _begin(send)
    for _ in range(ROUNDS):
        await asyncio.sleep(GAP)
        await send({"type": "http.response.body", "body": EVENT, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def forwarder(scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Callable[..., Any]) -> None:
    """An ASGI application that passes on what the source of the port in SOURCE sends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(os.environ["SOURCE"]))
    writer.write(b"GET / HTTP/1.1\r\nHost: source\r\nConnection: close\r\n\r\n")
    await reader.readuntil(b"\r\n\r\n")
    await _begin(send)
    while size := int((await reader.readline()).strip(), 16):
        piece = await reader.readexactly(size + 2)
        await send({"type": "http.response.body", "body": piece[:-2], "more_body": True})
    writer.close()
    await send({"type": "http.response.body", "body": b""})


async def _begin(send: Callable[..., Any]) -> None:
    head = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": head})


def _serve(application: str, environment: dict[str, str]) -> tuple[subprocess.Popen[str], int]:
    """A uvicorn on a free port."""
    code = (
        "import socket, uvicorn; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True);"
        f"from benchmarks.capacity.forward import {application} as app;"
        "uvicorn.Server(uvicorn.Config(app, log_level='error', access_log=False, lifespan='off')).run(sockets=[s])"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


async def _read(port: int, path: bytes) -> bytes:
    for _ in range(200):
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except ConnectionRefusedError:
            await asyncio.sleep(0.05)
        else:
            writer.write(b"GET " + path + b" HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
            found = await reader.read(-1)
            writer.close()
            return found
    raise RuntimeError("the process did not listen within ten seconds")


def _proxy(path: str, source_port: int) -> tuple[subprocess.Popen[str], int]:
    """HAProxy with one thread on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = (
        "global\n nbthread 1\ndefaults\n mode http\n timeout client 1m\n timeout server 1m\n timeout connect 5s\n"
        f"listen l\n bind 127.0.0.1:{port}\n server s 127.0.0.1:{source_port}\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "proxy.cfg").write_text(text)
        process = subprocess.Popen([path, "-db", "-f", f"{folder}/proxy.cfg"], text=True, stderr=subprocess.DEVNULL)
        asyncio.run(_read(port, b"/"))
    return process, port


def _cpu_of(process: subprocess.Popen[str]) -> float:
    """CPU seconds of a process, to a hundredth (proc(5): utime and stime)."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _rounds(port: int, repeats: int, process: subprocess.Popen[str]) -> list[float]:
    """CPU seconds of a piece, `repeats` times."""
    found = []
    for index in range(repeats + 1):
        before = _cpu_of(process)
        bodies = await asyncio.gather(*(_read(port, b"/") for _ in range(STREAMS)))
        if {body.count(b"data: ") for body in bodies} != {ROUNDS}:
            raise RuntimeError("a piece was lost")
        if index:  # the first one warms up
            found.append((_cpu_of(process) - before) / (STREAMS * ROUNDS))
    return found


def measured(repeats: int, proxy: str | None = None) -> dict[str, float | int]:
    """CPU seconds of a piece, median and range, through the forwarder or through HAProxy."""
    first, source_port = _serve("source", dict(os.environ))
    try:
        asyncio.run(_read(source_port, b"/"))
        environment = os.environ | {"SOURCE": str(source_port)}
        second, port = _proxy(proxy, source_port) if proxy else _serve("forwarder", environment)
        try:
            found = asyncio.run(_rounds(port, repeats, second))
        finally:
            second.kill()
            second.wait()
    finally:
        first.kill()
        first.wait()
    return {
        "streams": STREAMS,
        "piece_bytes": len(EVENT),
        "piece_seconds": statistics.median(found),
        "least": min(found),
        "most": max(found),
    }
