"""Neurons, heads and ActAdd in the engine: equal to the naive loop, and on the embedded model beyond their controls."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from steering.demo import MODEL
from steering.demo.contrast import contrast, prompts
from steering.demo.documents import message
from steering.demo.judges import count_tone
from steering.fit.act_add import fit_act_add
from steering.fit.concept import encode_class
from steering.fit.heads import HeadsSettings, fit_heads
from steering.fit.neurons import NeuronsSettings, fit_neurons
from steering.methods import ActAdd, Heads, Neurons, compile_program
from steering.plan import Plan
from steering.plant.capture import capture_means
from steering.plant.massive import Caution
from steering.plant.plant import Plant
from steering.program import Program, Scope
from steering.runtime import Engine, EngineSettings, Request, Sampling
from steering.types import Site
from tests.fit.test_concept import NEGATIVE, POSITIVE
from tests.plants import tiny_tokenizer
from tests.runtime.naive import greedy, run
from tests.runtime.test_engine import LLAMA, PROMPTS, assert_naive, engine

TEXTS = Plant(LLAMA.model, tiny_tokenizer())
EVERYWHERE = Scope("all", "all")


class Bench:
    """A model with some plans."""

    caution, spare_massive = Caution(), True

    def __init__(self, plant: Plant, plans: dict[str, Plan]) -> None:
        self.depth, self.width, self.plans = plant.depth, plant.width, plans

    def plan(self, name: str, kind: type[Any]) -> Any:
        found = self.plans[name]
        assert isinstance(found, kind)
        return found

    def concept(self, name: str) -> Any:
        raise KeyError(name)


@pytest.fixture(scope="module")
def bench() -> Bench:
    plans: dict[str, Plan] = {
        "neurons": fit_neurons(TEXTS, "n", POSITIVE, NEGATIVE, NeuronsSettings(skip=2, top=60)),
        "heads": fit_heads(TEXTS, "h", POSITIVE, NEGATIVE, HeadsSettings(probe="logistic")),
        "act_add": fit_act_add(TEXTS, "a", ["I love you and the cat"], ["I hate the sea"]),
    }
    return Bench(TEXTS, plans)


def split(program: Program) -> Program:
    """Terms whose channels have scopes of their own, as one term for each channel: what the naive loop knows."""
    terms = []
    for term in program.terms:
        for channel, scope in enumerate(term.scopes or [None]):
            if scope is None:
                terms.append(term)
                continue
            laws = {
                r: replace(law, strength=law.strength * (torch.arange(law.rank) == channel))
                for r, law in term.laws.items()
            }
            terms.append(replace(term, laws=laws, scope=scope, scopes=()))
    return Program(tuple(terms), program.guard)


def test_a_mixed_batch_equals_the_naive_loop(bench: Bench) -> None:
    lists: list[list[Any]] = [
        [Neurons(plan="neurons", apply=EVERYWHERE)],
        [Neurons(plan="neurons", mode="zero"), Heads(plan="heads", alpha=3.0, heads=5)],
        [ActAdd(plan="act_add", layer=1, strength=2.0), Heads(plan="heads", mode="mean", heads=2)],
        [],
        [Heads(plan="heads", mode="clamp", setpoint=1.5, apply=EVERYWHERE)],
        [ActAdd(plan="act_add", layer=2, max_effort=0.1), ActAdd(plan="act_add", layer=1, control=True)],
    ]
    pairs = [(PROMPTS[i % len(PROMPTS)], compile_program(each, bench)) for i, each in enumerate(lists)]
    for budget in (64, 7):
        requests = [Request(str(i), p, greedy(logprobs=0), g) for i, (p, g) in enumerate(pairs)]
        done = run(engine(max_step_tokens=budget), requests)
        assert_naive(LLAMA.model, done, [(p, split(g)) for p, g in pairs])
    held = done[4].receipt
    assert held is not None
    assert held.tokens_steered == len(PROMPTS[4]) - 1 + 9
    added = done[5].receipt
    assert added is not None
    assert added.tokens_steered <= 6


class Demo:
    """The embedded model, examples of a tone, and how many words of it some answers hold."""

    def __init__(self) -> None:
        self.plant = Plant.load(MODEL, dtype="float32")
        self.engine = Engine(self.plant, EngineSettings(max_batch=32, max_model_len=128))
        self.positive, self.negative = contrast("positive", 40, 7)
        self.free = prompts("positive", "neutral", "test", 24)
        self.asked = [[message("system", "Be positive."), *chat] for chat in self.free if not isinstance(chat, str)]

    def tone(self, chats: list[Any], method: Any = None, plan: Plan | None = None) -> int:
        """Positive words less negative ones in 24 greedy answers of 24 tokens."""
        program = Program()
        if method is not None and plan is not None:
            program = compile_program([method], Bench(self.plant, {"p": plan}))
        sampling = Sampling(max_tokens=24, temperature=0.0)
        requests = [Request(str(i), tuple(self.plant.encode(chat)), sampling, program) for i, chat in enumerate(chats)]
        texts = [self.plant.tokenizer.decode(list(done.tokens)) for done in self.engine.generate(requests)]
        return sum(count_tone(text, "positive") - count_tone(text, "negative") for text in texts)


@pytest.fixture(scope="module")
def demo() -> Demo:
    return Demo()


def test_experts_of_a_tone_carry_it_and_random_units_do_not(demo: Demo) -> None:
    """What is left of the distance between the classes, on examples that the fit has not seen, at the last block but
    one, when the answers are read: 256 of 4096 units, damped by AurA or silenced."""
    settings = NeuronsSettings(positions="answer")
    plan = fit_neurons(demo.plant, "p", demo.positive, demo.negative, settings)
    assert plan.quality["auroc"] > plan.quality["random"]["auroc"] + 0.05
    classes = [encode_class(demo.plant, "x", rows, settings.reading()) for rows in contrast("positive", 16, 99)]

    def means(rows: Any, method: Neurons | None = None) -> torch.Tensor:
        shell, site = demo.plant.shell(), Site("resid_post", 6)
        laws = method.compile(Bench(demo.plant, {"p": plan})).laws if method else {}
        for route, law in laws.items():
            demo.plant.tap(shell, route.write, lambda x, law=law: steered(law, x))  # type: ignore[misc]
        ids, chosen = [row[0] for row in rows], [row[1] for row in rows]
        return capture_means(demo.plant, ids, [site], chosen, shell=shell)[site].mean(0)

    def steered(law: Any, x_BTE: torch.Tensor) -> torch.Tensor:
        flat = x_BTE[:, 1:].flatten(0, 1)
        return torch.cat([x_BTE[:, :1], law(flat, flat).reshape(x_BTE[:, 1:].shape)], dim=1)

    plus, minus = map(means, classes)
    across = (plus - minus) / (plus - minus).square().sum()
    for mode in ("aura", "zero"):
        lost, random = (
            float((plus - means(classes[0], Neurons(plan="p", mode=mode, control=control))) @ across)
            for control in (False, True)
        )
        assert lost > 0.2
        assert abs(random) < 0.06


def test_shifted_and_held_heads_turn_the_tone_and_random_ones_do_not(demo: Demo) -> None:
    plan = fit_heads(demo.plant, "p", demo.positive, demo.negative, HeadsSettings(positions="answer"))
    assert plan.quality["accuracy"] > plan.quality["random"]["accuracy"]
    free, asked = demo.tone(demo.free), demo.tone(demo.asked)
    for chats, before, fields in (
        (demo.free, free, {"alpha": 3.0, "heads": 12}),
        (demo.asked, asked, {"mode": "clamp", "setpoint": -1.0, "heads": 24}),
    ):
        chosen, random = (
            demo.tone(chats, Heads(plan="p", control=control, apply=EVERYWHERE, **fields), plan)
            for control in (False, True)
        )
        assert abs(chosen - before) > 40
        assert abs(random - before) < 20


def test_two_prompts_difference_turns_the_tone_and_a_random_one_does_not(demo: Demo) -> None:
    plus, minus = (
        [message("user", text)] for text in ("Be positive. I love this day.", "Be negative. I hate this day.")
    )
    plan = fit_act_add(demo.plant, "p", [plus], [minus])
    before = demo.tone(demo.free)
    chosen, random = (
        demo.tone(demo.free, ActAdd(plan="p", layer=2, strength=2.0, control=control), plan)
        for control in (False, True)
    )
    assert chosen - before > 40
    assert abs(random - before) < 20
