"""Adapters, channels and interaction features in the engine: equal to the naive loop, and an adapter to its merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from steering.fit.channels import ChannelsSettings, fit_channels
from steering.fit.interaction import InteractionSettings, fit_interaction
from steering.formats.peft import import_adapter
from steering.methods import AdapterMix, Channels, Interaction, compile_program
from steering.plan import AdapterPlan, Plan
from steering.plant.plant import Plant
from steering.program import Program, Scope
from steering.runtime import Request
from tests.fit.test_concept import NEGATIVE, POSITIVE
from tests.formats.test_peft import PATHS, saved
from tests.plants import tiny, tiny_tokenizer
from tests.runtime.naive import greedy, run
from tests.runtime.test_engine import LLAMA, PROMPTS, assert_naive, engine

TEXTS = Plant(LLAMA.model, tiny_tokenizer())


class Bench:
    """The tiny model with a plan of each of the three kinds."""

    depth, width, caution = LLAMA.depth, LLAMA.width, LLAMA.caution

    def __init__(self, folder: Path) -> None:
        saved(folder, TEXTS)
        local = InteractionSettings(layers=(1, 2), leading=4, trailing=4, sources=1)
        plans: tuple[Plan, ...] = (
            import_adapter(folder, "lora", TEXTS),
            fit_channels(TEXTS, "talk", settings=ChannelsSettings(top=8)),
            fit_interaction(TEXTS, "local", POSITIVE + NEGATIVE, (), local),
        )
        self.plans = {plan.name: plan for plan in plans}

    def plan(self, name: str, kind: type[Any]) -> Any:
        found = self.plans[name]
        assert isinstance(found, kind)
        return found


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("adapter"))


def programs(bench: Bench) -> list[Program]:
    """Each method alone, all together, one under a bound, and a request that is not steered."""
    everywhere = Scope("all", "all")
    lists: list[list[Any]] = [
        [AdapterMix(plan="lora", weights={"*": 0.5, "layers.2.mlp": -0.25})],
        [Channels(plan="talk", channels=8, scale=-1.0, apply=everywhere)],
        [],
        [Interaction(plan="local", components=2, apply=everywhere)],
        [AdapterMix(plan="lora", weights=0.3, max_effort=0.1)],
        [
            AdapterMix(plan="lora", weights=0.25),
            Channels(plan="talk", channels=3, apply=everywhere),
            Interaction(plan="local", mode="keep"),
        ],
    ]
    return [compile_program(each, bench) for each in lists]  # type: ignore[arg-type]


def test_a_mixed_batch_equals_the_naive_loop(bench: Bench) -> None:
    pairs = [(PROMPTS[i % len(PROMPTS)], program) for i, program in enumerate(programs(bench))]
    for budget in (64, 7):
        requests = [Request(str(i), p, greedy(logprobs=0), g) for i, (p, g) in enumerate(pairs)]
        assert_naive(LLAMA.model, run(engine(max_step_tokens=budget), requests), pairs)


def test_an_adapter_generates_what_the_merged_model_does(bench: Bench) -> None:
    """Also beside a request that has none: its keys and values are its own."""
    plan = bench.plan("lora", AdapterPlan)
    merged = tiny("llama")
    for layer, target, A_RD, B_RE in plan.factors():
        merged.get_submodule(f"model.layers.{layer}.{PATHS[target]}").weight.data += 0.5 * B_RE.mT @ A_RD
    program = compile_program([AdapterMix(plan="lora", weights=0.5)], bench)  # type: ignore[arg-type]
    requests = [
        Request("with", PROMPTS[0], greedy(logprobs=0), program),
        Request("without", PROMPTS[0], greedy(logprobs=0), Program()),
    ]
    with_it, without = run(engine(), requests)
    assert with_it.tokens != without.tokens
    ids = torch.tensor([PROMPTS[0]])
    for token in with_it.tokens:
        with torch.no_grad():
            logits = merged(ids).logits[0, -1]
        assert int(logits.argmax()) == token
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
