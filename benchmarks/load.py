"""Latency over HTTP under arrivals that wait for nobody: a server, and clients that come at rising rates.

    python -m benchmarks.load [--model DIR] [--device cpu] [--rates 1 2 4 8 16] [--seconds 30] [--steered 0.5]
                              [--max-batch 16] [--queue-limit 256] [--seed 0] [--name cpu]
    python -m benchmarks.load --minutes 10 [--rates 8]      endurance: one rate for that long

Arrivals are a Poisson process: the gaps are exponential, and a request is sent when its time has come, whether or not
those before it have been answered. Latency counts from that time, not from when the client got round to sending, so a
stall of either side shows in the figures of all who had to wait. Every request streams a chat of random length. A share
of them is steered, each with a concept and a setpoint of its own, among neighbours that are not. Told apart for the
two:

    ttft    arrival → first piece of text            itl    gap between two pieces of one stream
    e2e     arrival → end of the stream              p50, p99 by nearest rank, in milliseconds

The clients share the machine with the server; they read the stream without decoding it until it has ended. Endurance
also asks that no request be lost, that memory stay flat once caches are full, and that nothing runs at the end; the
exit code is 1 when that does not hold. Writes benchmarks/results/load-NAME.json, or load-endurance-NAME.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import platform
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from benchmarks.serving import figures, serving

RESULTS = Path(__file__).parent / "results"
WORDS = ("tell", "me", "about", "the", "dog", "garden", "music", "of", "a", "day", "in", "town", "and", "my", "friend")
CONCEPTS = ("positive", "negative", "polite", "rude", "formal", "informal", "english", "spanish", "truthful")
LENGTHS = (16, 32, 64)
"""Tokens of an answer; its end is not the model's to choose, so that a rate is a load."""
TIMEOUT = 120.0
WARM_UP = 0.25
"""Part of an endurance run before memory is compared: caches fill, the allocator finds its level."""
FLAT = 0.05


@dataclass(frozen=True)
class Arrival:
    """One request: when it comes, in seconds from the start, and what it asks."""

    at: float
    body: dict[str, Any]

    @property
    def is_steered(self) -> bool:
        """Whether it brings a setpoint of its own."""
        return "steering" in self.body


@dataclass(frozen=True)
class Answer:
    """What came of a request: `done`, `refused` or why it failed; seconds from its arrival to each piece of text."""

    is_steered: bool
    outcome: str
    pieces: tuple[float, ...] = ()
    end: float = 0.0
    tokens: int = 0


def arrivals(rate: float, seconds: float, steered: float, rng: random.Random) -> list[Arrival]:
    """A Poisson process of `rate` requests a second; each is steered with probability `steered`."""
    found, at = [], rng.expovariate(rate)
    while at < seconds:
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": " ".join(rng.choices(WORDS, k=rng.randint(1, 60)))}],
            "max_tokens": rng.choice(LENGTHS),
            "ignore_eos": True,
            "seed": rng.randrange(2**31),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if rng.random() < steered:
            body["steering"] = {"targets": {rng.choice(CONCEPTS): rng.uniform(-1.0, 2.0)}}
        found.append(Arrival(at, body))
        at += rng.expovariate(rate)
    return found


async def send(address: str, arrival: Arrival, began: float) -> Answer:
    """Send a request at its time and read its stream to the end. What goes wrong is an outcome."""
    due = began + arrival.at
    await asyncio.sleep(due - time.perf_counter())
    try:
        async with asyncio.timeout(TIMEOUT):
            status, lines, end = await _exchange(address, json.dumps(arrival.body).encode(), due)
    except (OSError, ValueError, IndexError, asyncio.IncompleteReadError, TimeoutError) as error:
        return Answer(arrival.is_steered, f"{type(error).__name__} {error}"[:100])
    if status == 429:
        return Answer(arrival.is_steered, "refused")
    if status != 200:
        return Answer(arrival.is_steered, f"status {status}")
    return _read(arrival, lines, end)


async def _exchange(address: str, body: bytes, due: float) -> tuple[int, list[tuple[float, bytes]], float]:
    """Status, the stream's events each with its time, and the time of the end, from `due` on.

    An HTTP client of a dozen lines: a general one costs as much per piece as the server does, on the same cores. The
    server writes each event as a chunk of its own, in one line that begins with `data: `.
    """
    parts = urlsplit(address)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
            f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        await writer.drain()
        status = int((await reader.readline()).split()[1])
        lines = []
        while line := await reader.readline():
            if line.startswith(b"data: "):
                lines.append((time.perf_counter() - due, line[6:].strip()))
        return status, lines, time.perf_counter() - due
    finally:
        writer.close()


def _read(arrival: Arrival, lines: Sequence[tuple[float, bytes]], end: float) -> Answer:
    """What a stream says, decoded after its end."""
    if not lines or lines[-1][1] != b"[DONE]":
        return Answer(arrival.is_steered, "lost: the stream broke off")
    pieces, tokens, reason, has_receipt = [], 0, None, False
    for at, line in lines[:-1]:
        event = json.loads(line)
        if "error" in event:
            return Answer(arrival.is_steered, f"error: {event['error'].get('code')}")
        has_receipt |= "steering" in event
        tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        for choice in event.get("choices", ()):
            reason = choice["finish_reason"] or reason
            if choice["delta"].get("content"):
                pieces.append(at)
    if reason != "length" or tokens != arrival.body["max_tokens"]:
        return Answer(arrival.is_steered, f"lost: {tokens} tokens, finish reason {reason}")
    if has_receipt != arrival.is_steered:
        return Answer(arrival.is_steered, "lost: receipt")
    return Answer(arrival.is_steered, "done", tuple(pieces), end, tokens)


def percentile(values: Sequence[float], share: float) -> float:
    """The value by nearest rank: the least one that at least `share` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)]


def latency(answers: Sequence[Answer]) -> dict[str, float | int]:
    """Percentiles in milliseconds over those that were answered; none where nobody was."""
    done = [answer for answer in answers if answer.outcome == "done"]
    measured = {
        "ttft": [answer.pieces[0] for answer in done if answer.pieces],
        "itl": [b - a for answer in done for a, b in zip(answer.pieces, answer.pieces[1:], strict=False)],
        "e2e": [answer.end for answer in done],
    }
    found: dict[str, float | int] = {"requests": len(done)}
    for name, values in measured.items():
        for share in (0.5, 0.99):
            if values:
                found[f"{name}_p{share * 100:.0f}_ms"] = round(1e3 * percentile(values, share), 2)
    return found


async def run(address: str, planned: Sequence[Arrival], watch: Callable[[], Any] | None = None) -> dict[str, Any]:
    """Send all that was planned; what came of it. `watch` is a coroutine function that is called along the way."""
    watching = asyncio.ensure_future(watch()) if watch else None
    began = time.perf_counter() + 0.1
    answers = await asyncio.gather(*(send(address, arrival, began) for arrival in planned))
    took = time.perf_counter() - began
    if watching:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    sides = {
        name: latency([answer for answer in answers if answer.is_steered == steered])
        for name, steered in (("unsteered", False), ("steered", True))
    }
    return {
        "requests": len(planned),
        "outcomes": dict(Counter(answer.outcome for answer in answers)),
        "tokens_per_second": round(sum(answer.tokens for answer in answers) / took, 1),
        "seconds": round(took, 2),
        "all": latency(answers),
        **sides,
    }


async def rising(address: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a rate, printed as it comes."""
    rng = random.Random(given.seed)
    await run(address, arrivals(4.0, 2.0, 0.5, rng))  # the first steps compile kernels and load concepts
    rows = []
    print("\n".join(table([])), flush=True)
    for rate in given.rates:
        row = {"rate": rate} | await run(address, arrivals(rate, given.seconds, given.steered, rng))
        print(list(table([row]))[-1], flush=True)
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The rows as text."""
    names = ("ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms")
    yield f"{'rate':>6} {'done':>6} {'else':>5} {'tok/s':>8} " + " ".join(f"{name:>12}" for name in names)
    for row in rows:
        done = row["outcomes"].get("done", 0)
        figures_ = " ".join(f"{row['all'].get(name, math.nan):12.1f}" for name in names)
        yield f"{row['rate']:6g} {done:6} {row['requests'] - done:5} {row['tokens_per_second']:8.0f} {figures_}"


async def endurance(address: str, given: argparse.Namespace) -> dict[str, Any]:
    """One rate for minutes, with the server's memory watched; the verdict with it."""
    seconds, memory = 60 * given.minutes, list[float]()
    async with httpx.AsyncClient(base_url=address, timeout=TIMEOUT) as http:

        async def watch() -> None:
            while True:
                memory.append((await figures(http))["process_resident_memory_bytes"])
                await asyncio.sleep(min(5.0, seconds / 120))

        rate, rng = given.rates[-1], random.Random(given.seed)
        found = {"rate": rate} | await run(address, arrivals(rate, seconds, given.steered, rng), watch)
        after = await figures(http)
    warm = memory[int(WARM_UP * len(memory)) :]
    third = max(len(warm) // 3, 1)
    growth = statistics.median(warm[-third:]) / statistics.median(warm[:third]) - 1
    lost = {name: n for name, n in found["outcomes"].items() if name not in ("done", "refused")}
    return found | {
        "memory": {
            "growth": round(growth, 4),
            "first_mib": round(warm[0] / 2**20, 1),
            "last_mib": round(warm[-1] / 2**20, 1),
        },
        "verdict": {
            "no_request_lost": not lost,
            "memory_flat": growth <= FLAT,
            "nothing_runs_or_waits": after["num_requests_running"] == after["num_requests_waiting"] == 0,
        },
    }


def main() -> None:
    """Start a server, load it, print and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a model with the concepts of the embedded one; that one without it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 2.0, 4.0, 8.0, 16.0])
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--minutes", type=float, help="endurance at the last rate, in place of the rates")
    parser.add_argument("--steered", type=float, default=0.5)
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--queue-limit", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", help="of the results, in place of the device")
    given = parser.parse_args()
    options = ["--device", given.device, "--max-batch", str(given.max_batch), "--queue-limit", str(given.queue_limit)]
    body: dict[str, Any] = {
        "device": given.device,
        "processor": platform.processor() or platform.machine(),
        "model": given.model or "embedded",
        "max_batch": given.max_batch,
        "steered_share": given.steered,
        "answer_tokens": LENGTHS,
    }
    name = given.name or given.device
    with serving(given.model, options) as server:
        if given.minutes:
            found = asyncio.run(endurance(server.address, given))
        else:
            found = {"rows": asyncio.run(rising(server.address, given))}
    if given.minutes:
        found["verdict"] |= {"ended_with_code_0": server.code == 0, "no_exception_in_the_log": not server.failures}
        name = f"endurance-{name}"
        print(json.dumps(found, indent=1))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"load-{name}.json").write_text(json.dumps(body | found, indent=2) + "\n")
    sys.exit(not all(found.get("verdict", {}).values()))


if __name__ == "__main__":
    main()
