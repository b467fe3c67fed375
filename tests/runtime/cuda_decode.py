"""On a GPU: recorded decode steps and steps in the air give what plain ones give.

`test_graphs.py` and `test_flights.py` test all but the recording and the asynchrony on a CPU; this is the rest. Run it
where there is a GPU: `python -m pytest tests/runtime/cuda_decode.py`.
"""

from __future__ import annotations

import logging

import pytest
import torch

from steering.plant.plant import Plant
from steering.program import Program
from steering.runtime import Engine, EngineSettings, Finished, Request
from tests.plants import tiny
from tests.runtime.naive import across_program, run
from tests.runtime.test_graphs import assert_equal, mixed, requests

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)


def served(plant: Plant, asked: list[Request], *, graphs: bool, pipeline: bool) -> tuple[list[Finished], Engine]:
    own = Engine(plant, EngineSettings(max_batch=16, max_model_len=96, graphs=graphs, pipeline=pipeline))
    return run(own, asked), own


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "olmo2", "qwen3"])
@pytest.mark.parametrize("pipeline", [False, True])
def test_a_recorded_step_equals_one_that_is_not(family: str, pipeline: bool, caplog: pytest.LogCaptureFixture) -> None:
    plant = Plant(tiny(family).cuda())
    programs = mixed() if family == "llama" else [across_program(1), Program(), across_program(2, layers=(0, 1, 2))]
    asked = requests(programs, 24, trace=True)
    with caplog.at_level(logging.WARNING, logger="setpoint"):
        done, own = served(plant, asked, graphs=True, pipeline=pipeline)
    assert not caplog.records, "every step must be possible to record"
    assert own._runner._graphs is not None
    assert len(own._runner._graphs) > 0
    assert_equal(done, served(plant, asked, graphs=False, pipeline=False)[0])


def test_the_host_does_not_wait_within_a_step_in_the_air() -> None:
    """Launching the next step synchronises nothing."""
    own = Engine(Plant(tiny("llama").cuda()), EngineSettings(max_batch=16, max_model_len=96))
    for request in requests([across_program(i) for i in range(8)], 60):
        own.submit(request, lambda _: None)
    for _ in range(12):
        own.step()
    assert own._flight is not None
    torch.cuda.set_sync_debug_mode("error")  # waiting for an event, as landing does, is allowed
    try:
        for _ in range(8):
            own.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not own.stats().finished
