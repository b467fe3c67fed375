"""vLLM steers as the native engine does, token for token and with its receipts: on both of its runners, eager and
compiled, with its own modelling code and transformers', alone and in batches, and on two ranks."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from steering import Engine, EngineSettings, Finished, Guard, Positions, Program, Request, Scope, Site, When, Window
from steering.edit import Mask
from steering.law import Law
from steering.program import Term
from steering.types import TAPS, at, edit_at
from tests.plans import noise
from tests.tolerances import RUNTIME
from tests.vllm.common import chat, long_chat, plant, program, request
from tests.vllm.offline import asked, run

pytest.importorskip("vllm", reason="vLLM is not installed here: make vllm-test")

EVERYWHERE = Scope("all", "all")
PROMPTS = (chat(), chat("I went to the park."), chat("Say something about music and the sea."))
DOG: dict[str, Any] = {"concept": "dog", "layer": 4}


@cache
def residual() -> dict[str, Program]:
    """Programs that need the residual stream alone."""
    final = Term("final", "test", {at("final"): Law.addition(noise(plant().width, seed=3).float())}, EVERYWHERE)
    several = Program(
        (*program().terms, *program("ablate", concept="refusal").terms, *program("add", concept="spanish").terms),
        Guard(max_effort=0.5),
    )
    return {
        "none": Program(),
        "lqr": program(),
        "whole": program(apply=EVERYWHERE),
        "steps": program(concept="rude", apply=Scope("none", "all")),
        "windows": program(concept="dog", apply=Scope(Positions((1, -2)), Window((2, 5)))),
        "pid": program("pid", concept="positive", setpoint=1.0),
        "angular": program("angular", concept="positive", angle=60.0),
        "token gate": program(apply=EVERYWHERE, when=When(**DOG, above=0.1, on="token")),
        "prompt gate": program(when=When(**DOG, above=0.0, on="prompt")),
        "several": several,
        "final": Program((final,)),
        "eigenshift": program("eigenshift", plan="tone-eigenshift", alpha=0.5),
    }


@cache
def inner() -> dict[str, Program]:
    """Programs that act within blocks: a mask over every third channel of each site, and what the methods do there."""
    found = {
        "neurons": program("neurons", plan="tone-neurons"),
        "heads": program("heads", plan="tone-heads"),
        "reft": program("reft", plan="tone-reft"),
        "sparsity": program("sparsity", plan="sparse"),
    }
    for tap in TAPS:
        width = plant().width_of(Site(tap, 0 if tap == "final" else 3))
        scale = torch.where(torch.arange(width) % 3 == 0, 0.3, 1.0)
        mask = Mask.of(scale, 0.1 * torch.ones(width))
        laws = {edit_at("mask", tap, 0 if tap == "final" else 3): mask}
        found[f"mask of {tap}"] = Program((Term("mask", "test", laws, EVERYWHERE),))
    return found


@cache
def native() -> dict[str, Finished]:
    """What the native engine tells of every program, each with one of the prompts."""
    engine = Engine(plant(), EngineSettings(max_batch=8))
    programs = {**residual(), **inner()}
    requests = [request(name, prompt_of(i), own, max_tokens=8, ignore_eos=True) for i, (name, own) in _each(programs)]
    return {done.request_id: done for done in engine.generate(requests)}


def _each(programs: dict[str, Program]) -> Any:
    return enumerate(programs.items())


def prompt_of(i: int) -> tuple[int, ...]:
    return PROMPTS[i % len(PROMPTS)]


def assert_same(programs: dict[str, Program], told: list[dict[str, Any]]) -> None:
    """Tokens are equal, and receipts within float32's reach; no token that should have been measured is missing."""
    for (name, own), one in zip(programs.items(), told, strict=True):
        done = native()[name]
        assert one["tokens"] == list(done.tokens), name
        if own.acts:
            assert done.receipt is not None
            assert not one["lost"], name
            assert one["error"] is None, name
            assert_close(done.receipt.to_json(), one["receipt"], name)


def assert_close(expected: Any, got: Any, where: str) -> None:
    if isinstance(expected, dict):
        assert set(expected) == set(got), where
        for key in expected:
            assert_close(expected[key], got[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(expected) == len(got), where
        for i, (a, b) in enumerate(zip(expected, got, strict=True)):
            assert_close(a, b, f"{where}[{i}]")
    elif isinstance(expected, float):
        assert got == pytest.approx(expected, **RUNTIME["receipt"]), where
    else:
        assert got == expected, where


def rounds(programs: dict[str, Program]) -> list[list[dict[str, Any]]]:
    """All in batches, as many at a time as vLLM takes."""
    every = {**residual(), **inner()}
    order = list(every)
    return [[asked(prompt_of(order.index(name)), own) for name, own in programs.items()]]


ALIKE = ("", "late", "late", "whole", "whole", "")
"""How requests with one and the same long prompt are steered that come after one another."""


def alike() -> list[Program | None]:
    programs = {"": None, "late": program(), "whole": program(apply=EVERYWHERE)}
    return [programs[name] for name in ALIKE]


@pytest.fixture(scope="module")
def eager(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What transformers' code, not compiled, gives of every program, and then of prompts that begin alike."""
    after = [[asked(long_chat(), own)] for own in alike()]
    batches = [*rounds({**residual(), **inner()}), *after]
    return run(tmp_path_factory.mktemp("eager"), batches, model_impl="transformers", enforce_eager=True)


def test_every_site_under_transformers_code(eager: dict[str, Any]) -> None:
    assert eager["hello"][0]["taps"] == list(TAPS)
    assert_same({**residual(), **inner()}, eager["rounds"][0])


def test_vllms_own_code_adds_hidden_and_residual(tmp_path: Path) -> None:
    """And a batch gives what single requests give."""
    alone = [[one] for one in rounds(residual())[0][:4]]
    told = run(tmp_path, [*rounds(residual()), *alone], model_impl="vllm", enforce_eager=True)
    assert told["hello"][0]["taps"] == ["resid_pre", "resid_post", "final"]
    assert_same(residual(), told["rounds"][0])
    for (one,), together in zip(told["rounds"][1:], told["rounds"][0], strict=False):
        assert one["tokens"] == together["tokens"]


def test_compiled(tmp_path: Path) -> None:
    """vLLM's own code, which has hooks of both kinds."""
    programs = {name: residual()[name] for name in ("none", "lqr", "whole", "token gate", "several", "final")}
    told = run(tmp_path, rounds(programs), model_impl="vllm", enforce_eager=False)
    assert told["hello"][0]["compiled"]
    assert_same(programs, told["rounds"][0])


def test_the_newer_runner(tmp_path: Path) -> None:
    programs = {name: residual()[name] for name in ("none", "lqr", "windows", "token gate", "prompt gate")}
    env = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}
    told = run(tmp_path, rounds(programs), env, model_impl="transformers", enforce_eager=True)
    assert told["hello"][0]["runner"].startswith("vllm.v1.worker.cpu.")
    assert_same(programs, told["rounds"][0])


def test_two_ranks_address_neurons_and_heads_of_the_whole_model(tmp_path: Path) -> None:
    programs = {**residual(), **inner()}
    told = run(tmp_path, rounds(programs), module="tests.vllm.ranks", model_impl="transformers")
    assert told["ranks"] == 2
    assert_same(programs, told["rounds"][0])
    expected = {"ended": "TeamLost", "heard": ["TeamLost"], "after": "TeamLost", "workers": 2}
    assert told["killed"] == expected, "a worker that dies ends what runs, and the engine"


def test_the_prefix_cache_shares_what_is_alike_and_nothing_else(eager: dict[str, Any]) -> None:
    prompt = long_chat()
    ends = [one for (one,) in eager["rounds"][1:]]
    shared = (len(prompt) - 1) // 32 * 32  # whole blocks before the first steered position are anybody's
    assert shared > 0
    assert [one["cached"] for one in ends] == [0, shared, shared, 0, 0, shared]
    assert ends[0]["tokens"] == ends[5]["tokens"]
    engine = Engine(plant(), EngineSettings(max_batch=1, prefix_cache=False))
    for own, one in zip(alike(), ends, strict=True):
        (done,) = engine.generate(
            [Request("r", prompt, request("r", max_tokens=8, ignore_eos=True).sampling, own or Program())]
        )
        assert one["tokens"] == list(done.tokens)
        if own is not None:
            assert done.receipt is not None
            assert one["error"] is None
            assert one["receipt"]["tokens_steered"] == done.receipt.tokens_steered
