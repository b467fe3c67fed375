"""Arrivals are a Poisson process, latency counts from when a request was due, and nothing that is lost is missed."""

from __future__ import annotations

import asyncio
import json
import random
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.load import Answer, Arrival, arrivals, latency, percentile, run, send, table

BODY: dict[str, Any] = {"max_tokens": 2}


def _frames(*documents: Any) -> bytes:
    """A response as uvicorn writes it: each event a chunk of its own."""
    events = [b"data: " + (d if isinstance(d, bytes) else json.dumps(d).encode()) + b"\n\n" for d in documents]
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(event), event) for event in events)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"


def _choice(text: str, reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text} if text else {}, "finish_reason": reason}]}


ROLE = {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
WHOLE = (ROLE, _choice("a"), _choice("b"), _choice("", "length"), {"choices": [], "usage": {"completion_tokens": 2}})


async def _against(reply: bytes, planned: list[Arrival], delay: float = 0.0) -> list[Answer]:
    """Send to a server that says one thing to everybody."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(delay)
        writer.write(reply)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        began = time.perf_counter()
        return await asyncio.gather(*(send(f"http://127.0.0.1:{port}", one, began) for one in planned))


def test_arrivals_are_a_poisson_process() -> None:
    rate, seconds = 20.0, 400.0
    found = arrivals(rate, seconds, 0.5, random.Random(1))
    gaps = np.diff([one.at for one in found])
    sigma = (rate * seconds) ** 0.5
    assert abs(len(found) - rate * seconds) < 5 * sigma
    assert 0 < found[0].at < found[-1].at < seconds
    # exponential gaps: mean and deviation are both 1/rate, and the median ln 2 / rate
    assert np.mean(gaps) * rate == pytest.approx(1.0, abs=5 / sigma)
    assert np.std(gaps) * rate == pytest.approx(1.0, abs=10 / sigma)
    assert np.median(gaps) * rate == pytest.approx(np.log(2), abs=5 / sigma)


def test_half_are_steered_each_in_its_own_way() -> None:
    found = arrivals(20.0, 100.0, 0.5, random.Random(2))
    setpoints = [tuple(one.body["steering"]["targets"].items()) for one in found if one.is_steered]
    assert abs(len(setpoints) - len(found) / 2) < 5 * (len(found) / 4) ** 0.5
    assert len(set(setpoints)) == len(setpoints)
    assert not any(one.is_steered for one in arrivals(20.0, 10.0, 0.0, random.Random(3)))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.sampled_from([0.01, 0.5, 0.75, 0.99, 1.0]))
def test_a_percentile_is_numpys_inverse_of_the_distribution(values: list[float], share: float) -> None:
    assert percentile(values, share) == np.quantile(values, share, method="inverted_cdf")


def test_a_whole_stream_is_answered() -> None:
    (answer,) = asyncio.run(_against(_frames(*WHOLE, b"[DONE]"), [Arrival(0.0, BODY)]))
    assert (answer.outcome, answer.tokens, len(answer.pieces)) == ("done", 2, 2)
    assert 0 < answer.pieces[0] <= answer.pieces[1] <= answer.end


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        (_frames(*WHOLE), "lost: the stream broke off"),
        (
            _frames(ROLE, _choice("a", "length"), {"choices": [], "usage": {"completion_tokens": 1}}, b"[DONE]"),
            "lost: 1",
        ),
        (_frames(*WHOLE[:3], _choice("", "abort"), WHOLE[-1], b"[DONE]"), "lost: 2 tokens, finish reason abort"),
        (_frames(*WHOLE, {"choices": [], "steering": {}}, b"[DONE]"), "lost: receipt"),
        (_frames(ROLE, {"error": {"code": "internal_error"}}, b"[DONE]"), "error: internal_error"),
        (b"HTTP/1.1 429 Too Many Requests\r\n\r\n", "refused"),
        (b"HTTP/1.1 500 Internal Server Error\r\n\r\n", "status 500"),
        (b"", "IndexError"),
    ],
)
def test_whatever_else_a_server_says_is_told_apart(reply: bytes, outcome: str) -> None:
    (answer,) = asyncio.run(_against(reply, [Arrival(0.0, BODY)]))
    assert answer.outcome.startswith(outcome)


def test_latency_counts_from_when_a_request_was_due() -> None:
    planned = [Arrival(at, BODY) for at in (0.0, 0.05, 0.1)]
    answers = asyncio.run(_against(_frames(*WHOLE, b"[DONE]"), planned, delay=0.05))
    assert all(answer.pieces[0] >= 0.05 for answer in answers)

    async def late() -> list[Answer]:
        blocked = asyncio.ensure_future(_against(_frames(*WHOLE, b"[DONE]"), [Arrival(0.02, BODY)]))
        await asyncio.sleep(0.01)
        time.sleep(0.1)  # the client itself is held up: whoever was due meanwhile has waited
        return await blocked

    assert asyncio.run(late())[0].pieces[0] >= 0.08


def test_nobody_listening_is_an_outcome_and_the_sum_is_whole() -> None:
    planned = [Arrival(0.0, BODY | {"steering": {}}), Arrival(0.0, BODY)]
    found = asyncio.run(run("http://127.0.0.1:9", planned))
    assert sum(found["outcomes"].values()) == found["requests"] == 2
    assert found["all"] == {"requests": 0}
    assert len(list(table([{"rate": 1.0} | found]))) == 2


def test_latency_of_both_sides() -> None:
    answers = [
        Answer(True, "done", (0.1, 0.2, 0.4), 0.5, 3),
        Answer(True, "refused"),
        Answer(True, "done", (0.3,), 0.3, 1),
    ]
    found = latency(answers)
    assert found["requests"] == 2
    assert (found["ttft_p50_ms"], found["ttft_p99_ms"]) == (100, 300)
    assert (found["itl_p50_ms"], found["itl_p99_ms"]) == (100, 200)
    assert found["e2e_p99_ms"] == 500
