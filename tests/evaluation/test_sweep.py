"""A sweep's requests beside those of others. What it measures is tested where it is served, in tests/server."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from steering import Engine, EngineSettings, Plant, Request, Sampling
from steering.errors import QueueFull, SpecError
from steering.evaluation.sweep import Sweep, generate_few
from tests.plants import tiny, tiny_tokenizer


@pytest.fixture(scope="module")
def plant() -> Plant:
    return Plant(tiny("llama"), tiny_tokenizer(), name="tiny")


def requests(n: int, tokens: int) -> list[Request]:
    return [Request(f"mine-{i}", (1, 8 + i), Sampling(max_tokens=tokens, ignore_eos=True)) for i in range(n)]


@pytest.fixture
def narrow(plant: Plant) -> Iterator[Engine]:
    """One place and nowhere to wait."""
    engine = Engine(plant, EngineSettings(max_batch=1, queue_limit=0))
    engine.start()
    yield engine
    engine.stop()


def test_a_full_engine_is_asked_again_until_it_has_room(narrow: Engine) -> None:
    ended = threading.Event()
    first = Request("first", (1, 8), Sampling(max_tokens=60, ignore_eos=True))
    narrow.submit(first, lambda event: ended.set() if not hasattr(event, "token") else None)
    mine = requests(5, 2)
    ends = generate_few(narrow, mine, 4, lambda: None)
    assert ended.is_set()
    assert [end.request_id for end in ends] == [request.id for request in mine]
    assert [end.reason for end in ends] == ["length"] * 5
    assert narrow.stats().rejected > 0


@pytest.mark.parametrize("width", [1, 3])
def test_no_more_run_than_are_allowed(plant: Plant, width: int) -> None:
    engine = Engine(plant, EngineSettings(max_batch=8))
    outstanding: list[int] = []
    submit = engine.submit

    def counted(*arguments: object) -> None:
        submit(*arguments)
        stats = engine.stats()
        outstanding.append(stats.running + stats.waiting)

    engine.submit = counted
    engine.start()
    generate_few(engine, requests(9, 4), width, lambda: None)
    engine.stop()
    assert len(outstanding) == 9
    assert max(outstanding) == width


def test_what_the_pause_raises_aborts_what_runs(plant: Plant) -> None:
    engine = Engine(plant, EngineSettings(max_batch=8))
    engine.start()
    calls = 0

    def pause() -> None:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_few(engine, requests(4, 100), 2, pause)
    deadline = time.monotonic() + 5
    while engine.stats().running + engine.stats().waiting and time.monotonic() < deadline:
        time.sleep(0.002)
    assert engine.stats().running + engine.stats().waiting == 0
    assert set(engine.stats().finished) == {"abort"}
    engine.stop()


def test_an_engine_that_shuts_down_ends_the_wait(plant: Plant) -> None:
    engine = Engine(plant, EngineSettings(max_batch=8))
    engine.start()
    calls = 0

    def pause() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            engine.stop()
        assert calls < 20, "it waits for ever"

    with pytest.raises(QueueFull, match="shutting down"):
        generate_few(engine, requests(4, 100), 1, pause)


@pytest.mark.parametrize(
    ("type_", "swept"), [("lqr", "setpoint"), ("clamp", "setpoint"), ("ablate", "strength"), ("add", "strength")]
)
def test_the_swept_field_is_the_setpoint_where_there_is_one(type_: str, swept: str) -> None:
    assert Sweep(concept="x", grid=(1.0,), prompts=("a",), type=type_).swept == swept


def test_a_type_without_a_concept_cannot_be_swept() -> None:
    with pytest.raises(SpecError, match="lqr") as error:
        Sweep(concept="x", grid=(1.0,), prompts=("a",), type="magic").swept  # noqa: B018
    assert error.value.param == "type"
