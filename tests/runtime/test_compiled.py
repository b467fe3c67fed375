"""Compiled feed-forward modules give what the modules give, and step aside for whoever looks inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from steering.errors import SpecError
from steering.plant.plant import Plant
from steering.program import Program
from steering.runtime import Engine, EngineSettings, Request
from steering.types import Site, edit_at
from tests.plants import tiny
from tests.runtime.naive import across_program, greedy, run
from tests.runtime.test_edits import blank, mask, program
from tests.runtime.test_engine import LLAMA, PROMPTS, assert_naive

COMPILE = torch.compile


def engine(plant: Plant = LLAMA, **settings: Any) -> Engine:
    return Engine(plant, EngineSettings(max_batch=16, max_model_len=96, compile=True, **settings))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Traced as for inductor, run as traced: how many tokens each compiled call had."""
    found = list[int]()

    def traced(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        inner = COMPILE(function, backend="eager", **options)

        def call(x_1TD: torch.Tensor) -> Any:
            found.append(x_1TD.shape[1])
            return inner(x_1TD)

        return call

    monkeypatch.setattr(torch, "compile", traced)
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_compiled_modules_say_what_the_naive_loop_says(family: str, calls: list[int]) -> None:
    plant = Plant(tiny(family))
    own = engine(plant)
    assert set(calls) == {1, 2}, "both shapes are compiled at the start"
    calls.clear()
    pairs = [(PROMPTS[0], across_program(1)), (PROMPTS[1], Program()), (PROMPTS[2], blank("mlp_out", 1))]
    done = run(own, [Request(str(i), p, greedy(logprobs=0), g) for i, (p, g) in enumerate(pairs)])
    assert_naive(plant.model, done, pairs)
    assert len(calls) == plant.depth * own.stats().steps


def test_a_module_is_left_as_it_is_once_somebody_looks_inside(calls: list[int]) -> None:
    inside = program({edit_at("mask", "mlp_act", 1): mask(LLAMA.width_of(Site("mlp_act", 1)), 1)})
    pairs = [(PROMPTS[0], inside), (PROMPTS[1], Program())]
    own = engine(graphs=True)
    calls.clear()
    done = run(own, [Request(str(i), p, greedy(logprobs=0), g) for i, (p, g) in enumerate(pairs)])
    assert_naive(LLAMA.model, done, pairs)
    assert len(calls) == (LLAMA.depth - 1) * own.stats().steps


def test_a_machine_or_a_model_that_cannot_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpecError, match="mixes experts") as experts:
        engine(Plant(tiny("mixtral")))
    assert experts.value.param == "compile"

    def fails(*_: object, **__: object) -> Callable[..., Any]:
        def call(_: torch.Tensor) -> Any:
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")

        return call

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(SpecError, match=r"g\+\+") as refused:
        engine()
    assert refused.value.param == "compile"
    with pytest.raises(SpecError, match="compile"):
        EngineSettings(compile=1)  # type: ignore[arg-type]
