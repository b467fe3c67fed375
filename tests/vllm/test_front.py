"""What servers do around vLLM's engines, without vLLM: measurements, questions that would get lost, lost workers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from server import vllm_front
from server.host import Host, Service
from server.settings import ServerSettings
from server.vllm_front import Front
from steering import Store, VllmEngine, VllmSettings
from steering.errors import SteeringError, TeamLost
from steering.runtime.desk import Desk
from tests.vllm.common import plant, request
from tests.vllm.test_account import N_PROMPT, program


def test_measurements_are_taken_while_nobody_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_front, "SECONDS", 0.01)
    taken: list[str] = []

    class Llm:
        async def collective_rpc(self, method: str) -> list[bytes]:
            taken.append(method)
            if len(taken) == 1:
                raise ConnectionError
            return [b""]

    async def run() -> None:
        front = Front(Llm())
        front.accounts.open("a", program(), N_PROMPT)
        front.keep_taking()
        front.keep_taking()
        await asyncio.sleep(0.2)
        assert 3 < len(taken) <= 21, "one taker, which outlives what fails"
        front.accounts.close("a")
        await asyncio.sleep(0.05)
        n = len(taken)
        await asyncio.sleep(0.05)
        assert len(taken) == n, "nobody is steered any more"

    asyncio.run(run())


def test_a_request_that_would_lose_its_steering_is_refused() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed here: make vllm-test")
    from vllm.exceptions import VLLMValidationError

    from server.vllm_plugin import _checked

    class Asked:
        def __init__(self, extra: dict[str, Any] | None, xargs: dict[str, Any] | None) -> None:
            self.model_extra, self.vllm_xargs = extra, xargs

    sampled, searched = _checked(lambda request: 1), _checked(lambda request: 1, is_beam=True)
    assert sampled(Asked({}, {"steering": "{}"})) == searched(Asked(None, None)) == 1
    for checked, asked, param in (
        (sampled, Asked({"steering": {}}, None), "steering"),
        (searched, Asked({}, {"steering": "{}"}), "use_beam_search"),
    ):
        with pytest.raises(VLLMValidationError) as raised:
            checked(asked)
        assert raised.value.parameter == param


def test_a_server_hears_that_vllm_lost_a_worker(tmp_path: Path) -> None:
    """And ends, with code 1, as with processes of its own: `tests.server.test_tensor_parallel`."""
    engine = object.__new__(VllmEngine)
    Desk.__init__(engine, VllmSettings())
    engine._lost, engine._on_loss = None, []
    service = Service(ServerSettings(), Host(plant(), engine, Store(tmp_path), "demo"))
    heard: list[SteeringError] = []
    service.when_lost(heard.append)
    engine._lose()
    engine._lose()
    service.when_lost(heard.append)  # who comes late hears it too
    assert [type(error) for error in heard] == [TeamLost, TeamLost]
    with pytest.raises(TeamLost, match="start again"):
        engine.submit(request("late"), lambda event: None)
