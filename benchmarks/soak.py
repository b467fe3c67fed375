"""A server under four times the load that it admits, for minutes, among clients that leave, lie and cancel.

A real process of `setpoint serve` with a small queue; 4 × the queue's places of clients, each doing one thing after
another, drawn at random: whole answers, streams, steered ones, streams that the client leaves, requests it gives up,
bodies that are wrong, fits that are cancelled. At the end everything must be as it was: nothing runs or waits, every
place can be taken again, no file is left open, the memory is flat, and each request that was accepted and not left has
been answered to its end.

    python -m benchmarks.soak [--minutes 10] [--model DIR] [--max-batch 8] [--queue-limit 16] [--seed 0] [--out FILE]

Prints the verdict as JSON; the exit code is 0 when all of it holds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx

from benchmarks.serving import figures, serving

LOAD = 4
"""Clients for each place in the queue."""
WARM_UP = 0.25
"""Part of the time before memory is compared: caches fill, the allocator finds its level."""
FLAT = 0.05
SETTLE_SECONDS = 20.0
WORDS = ("tell", "me", "about", "the", "dog", "garden", "music", "of", "a", "day", "in", "town", "and", "my", "friend")
CONCEPTS = ("positive", "negative", "polite", "rude", "formal", "informal", "english", "spanish", "truthful")
BAD: tuple[tuple[int, str, bytes, str], ...] = (
    (400, "/v1/chat/completions", b"{", "application/json"),
    (400, "/v1/chat/completions", b'{"messages": []}', "application/json"),
    (400, "/v1/completions", b'{"prompt": "a", "temperature": 1e999}', "application/json"),
    (400, "/v1/completions", b'{"prompt": "a", "steering": {"targets": {"nobody": 1}}}', "application/json"),
    (400, "/v1/completions", b'{"prompt": "a", "steering": {"target": {}}}', "application/json"),
    (400, "/v1/completions", b'{"prompt": [99999999]}', "application/json"),
    (400, "/v1/completions", b"[" * 50_000, "application/json"),
    (400, "/v1/steering/fit", b'{"name": "../x", "positive": ["a"], "negative": ["b"]}', "application/json"),
    (404, "/v1/completions", b'{"prompt": "a", "model": "other"}', "application/json"),
    (404, "/v1/nothing", b"{}", "application/json"),
    (413, "/v1/completions", b'{"prompt": "' + b"a" * 2**21 + b'"}', "application/json"),
    (415, "/v1/completions", b"prompt=a", "application/x-www-form-urlencoded"),
)


class Clients:
    """What the clients do, and what came of it."""

    def __init__(self, http: httpx.AsyncClient, rng: random.Random) -> None:
        self.http = http
        self.rng = rng
        self.counts: Counter[str] = Counter()
        self.broken: list[str] = []
        """What was accepted and not answered as it should have been."""
        self._acts: tuple[tuple[int, Callable[[], Awaitable[str]]], ...] = (
            (30, self.whole), (30, self.stream), (15, self.leave), (5, self.give_up), (15, self.lie), (5, self.cancel),
        )  # fmt: skip

    async def live(self, end: float) -> None:
        """One client: one thing after another until `end`."""
        weights = [weight for weight, _ in self._acts]
        while time.monotonic() < end:
            ((_, act),) = self.rng.choices(self._acts, weights)
            try:
                outcome = await act()
            except (httpx.HTTPError, ValueError, KeyError) as error:
                outcome = f"broken {act.__name__}"
                self.broken.append(f"{act.__name__}: {type(error).__name__} {error}"[:200])
            self.counts[outcome] += 1
            if outcome == "refused":
                await asyncio.sleep(self.rng.uniform(0.05, 0.5))

    def body(self, stream: bool) -> dict[str, Any]:
        """A chat of random length, steered in one of many ways or not at all."""
        text = " ".join(self.rng.choices(WORDS, k=self.rng.randint(1, 60)))
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": text}],
            "max_tokens": self.rng.choice((1, 4, 16, 64)),
            "seed": self.rng.randrange(1000),
            "stream": stream,
        }
        if self.rng.random() < 0.6:
            chosen = self.rng.sample(CONCEPTS, self.rng.randint(1, 2))
            body["steering"] = {"targets": {name: round(self.rng.uniform(-1, 2), 1) for name in chosen}}
        return body

    async def whole(self) -> str:
        """A whole answer."""
        body = self.body(False)
        response = await self.http.post("/v1/chat/completions", json=body)
        if response.status_code == 429:
            return "refused"
        answer = response.raise_for_status().json()
        self._check(answer["choices"][0]["finish_reason"] in ("stop", "length"), "whole: no finish reason")
        self._check(("steering" in answer) == ("steering" in body), "whole: receipt")
        return "answered"

    async def stream(self) -> str:
        """A stream to its end."""
        body = self.body(True)
        async with self.http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code == 429:
                return "refused"
            response.raise_for_status()
            lines = [line async for line in response.aiter_lines() if line]
        self._check(lines[-1] == "data: [DONE]", "stream: no end")
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        self._check(not any("error" in chunk for chunk in chunks), f"stream: {chunks[-1]}"[:200])
        reasons = [c["choices"][0]["finish_reason"] for c in chunks if c.get("choices")]
        self._check(reasons[-1] in ("stop", "length"), "stream: no finish reason")
        self._check(("steering" in chunks[-1]) == ("steering" in body), "stream: receipt")
        return "streamed"

    async def leave(self) -> str:
        """A stream that is left after a few chunks."""
        async with self.http.stream("POST", "/v1/chat/completions", json=self.body(True)) as response:
            if response.status_code == 429:
                return "refused"
            left = self.rng.randint(0, 8)
            async for _ in response.aiter_lines():
                if (left := left - 1) < 0:
                    break
        return "left"

    async def give_up(self) -> str:
        """A request that is given up before its answer."""
        try:
            response = await self.http.post(
                "/v1/chat/completions", json=self.body(False), timeout=self.rng.uniform(0.01, 0.2)
            )
        except httpx.TimeoutException:
            return "gave up"
        return "refused" if response.status_code == 429 else "answered"

    async def lie(self) -> str:
        """A request that is wrong."""
        status, path, content, kind = self.rng.choice(BAD)
        response = await self.http.post(path, content=content, headers={"Content-Type": kind})
        told = response.json()["error"]
        self._check(response.status_code == status and told["message"], f"lie: {response.status_code} for {status}")
        return "told off"

    async def cancel(self) -> str:
        """A fit that is cancelled while it waits or runs."""
        name = f"soak-{self.rng.randrange(10**9)}"
        rows = [" ".join(self.rng.choices(WORDS, k=12)) for _ in range(40)]
        body = {"name": name, "positive": rows[:20], "negative": rows[20:], "method": {"jacobian_prompts": 40}}
        response = await self.http.post("/v1/steering/fit", json=body)
        if response.status_code == 429:
            return "refused"
        job = response.raise_for_status().json()["job"]
        await asyncio.sleep(self.rng.uniform(0, 1))
        ended = await self.http.delete(f"/v1/steering/jobs/{job}")
        self._check(ended.status_code in (200, 202, 409), f"cancel: {ended.status_code}")
        return "cancelled"

    def _check(self, holds: object, what: str) -> None:
        if not holds:
            self.broken.append(what)


async def settled(http: httpx.AsyncClient) -> dict[str, float]:
    """The figures once nothing runs any more, or after `SETTLE_SECONDS`."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        found = await figures(http)
        jobs = (await http.get("/v1/steering/jobs")).json()["data"]
        busy = found["num_requests_running"] + found["num_requests_waiting"]
        if time.monotonic() > deadline or not (busy or any(job["finished"] is None for job in jobs)):
            return found
        await asyncio.sleep(0.2)


async def places_free(http: httpx.AsyncClient, places: int) -> bool:
    """Whether as many requests as there are places are all accepted at once."""
    body = {"prompt": ["the day"] * places, "max_tokens": 2}
    return (await http.post("/v1/completions", json=body)).status_code == 200


async def soak(address: str, seconds: float, places: tuple[int, int], seed: int) -> dict[str, Any]:
    """Load the server at `address`; `places` are those that run and those that wait. Returns what was found."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits) as http:
        clients, end = Clients(http, random.Random(seed)), time.monotonic() + seconds
        await clients.whole()
        before = await figures(http)
        living = [asyncio.ensure_future(clients.live(end)) for _ in range(LOAD * places[1])]
        memory: list[tuple[float, float]] = []
        began = time.monotonic()
        while time.monotonic() < end:
            memory.append((time.monotonic() - began, (await figures(http))["process_resident_memory_bytes"]))
            await asyncio.sleep(min(1.0, seconds / 60))
        await asyncio.gather(*living)
    async with httpx.AsyncClient(base_url=address, timeout=120) as http:  # the load's connections are closed
        after = await settled(http)
        free = await places_free(http, sum(places))
    warm = [size for at, size in memory if at >= WARM_UP * seconds]
    first, last = (round(size / 2**20, 1) for size in (warm[0], warm[-1]))
    third = max(len(warm) // 3, 1)
    growth = statistics.median(warm[-third:]) / statistics.median(warm[:third]) - 1
    verdict = {
        "nothing_runs_or_waits": after["num_requests_running"] == after["num_requests_waiting"] == 0,
        "no_place_leaked": free and after["kv_cache_usage_ratio"] == 0,
        "no_file_leaked": after["process_open_fds"] <= before["process_open_fds"] + 4,
        "memory_flat": growth <= FLAT,
        "every_accepted_request_answered": not clients.broken,
        "load_was_beyond_the_queue": clients.counts["refused"] > 0,
    }
    return {
        "seconds": seconds,
        "outcomes": dict(sorted(clients.counts.items())),
        "broken": clients.broken[:20],
        "memory": {"growth": round(growth, 4), "first_mib": first, "last_mib": last},
        "after": {name: after[name] for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_ratio",
                  "steering_programs_resident", "process_open_fds")},
        "verdict": verdict,
    }  # fmt: skip


def main() -> None:
    """Start a server, load it, end it, print the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--model", help="folder of a model; the embedded one without it")
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--queue-limit", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    sizes = ["--max-batch", str(given.max_batch), "--queue-limit", str(given.queue_limit)]
    with serving(given.model, sizes) as server:
        places = (given.max_batch, given.queue_limit)
        found = asyncio.run(soak(server.address, 60 * given.minutes, places, given.seed))
    found["verdict"] |= {"ended_with_code_0": server.code == 0, "no_exception_in_the_log": not server.failures}
    found["log"] = server.failures[:3]
    found["passed"] = all(found["verdict"].values())
    text = json.dumps(found, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")
    sys.exit(not found["passed"])


if __name__ == "__main__":
    main()
