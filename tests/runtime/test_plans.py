"""Methods on plans in the engine: equal to the naive loop alone and in a mixed batch, and nothing at strength 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from steering.concept import Concept
from steering.condition import When
from steering.control import Weights
from steering.fit.eigenshift import EigenshiftSettings, fit_eigenshift
from steering.fit.subspace import SubspaceSettings, fit_subspace
from steering.methods import Clamp, Eigenshift, Reft, Subspace, compile_program
from steering.plan import Plan, ReftPlan
from steering.plant.plant import Plant
from steering.program import Guard, Program, Scope, Window
from steering.runtime import Request
from tests.control.cases import directions
from tests.fit.test_concept import NEGATIVE, POSITIVE
from tests.plans import noise, orthonormal
from tests.plants import WIDTH, tiny_tokenizer
from tests.runtime.naive import greedy, run
from tests.runtime.test_engine import LLAMA, PROMPTS, assert_naive, engine

TEXTS = Plant(LLAMA.model, tiny_tokenizer())


def edit() -> ReftPlan:
    """A LoReFT edit of the outputs of blocks 0 and 2, trained on f2+l1."""
    return ReftPlan(
        name="edit",
        model=LLAMA.fingerprint,
        depth=3,
        width=WIDTH,
        quality={},
        provenance={},
        layers=(0, 2),
        form="loreft",
        is_rotation=True,
        first=2,
        last=1,
        rotation=torch.stack([orthonormal(4, WIDTH, seed) for seed in (1, 2)]).float(),
        weight=0.5 * noise(2, 4, WIDTH, seed=3).float(),
        bias=noise(2, 4, seed=4).float(),
    )


class Bench:
    """The tiny model with a plan of every kind, and a concept for conditions."""

    depth, width, caution = LLAMA.depth, LLAMA.width, LLAMA.caution

    def __init__(self) -> None:
        shift = fit_eigenshift(TEXTS, "tone", POSITIVE, NEGATIVE, EigenshiftSettings(components=5, skip=2))
        pca = fit_subspace(TEXTS, "pca", POSITIVE, NEGATIVE, SubspaceSettings(layers=(0, 1, 2), skip=2))
        self.plans: dict[str, Plan] = {plan.name: plan for plan in (shift, pca, edit())}

    def plan(self, name: str, kind: type[Any]) -> Any:
        found = self.plans[name]
        assert isinstance(found, kind)
        return found

    def concept(self, name: str) -> Concept:
        v = directions(4, WIDTH, 7).float()
        ones, none = torch.ones(4), torch.zeros(4)
        gains = {"dense": v[:-1]}
        return Concept(name, LLAMA.fingerprint, v, ones, none, gains, (0, 1, 2), Weights(1, 1, 1), "dense")


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


def programs(bench: Bench) -> list[Program]:
    """Each method in several ways, alone and together, and a request that is not steered."""
    everywhere = Scope("all", Window((1, 8)))
    lists: list[list[Any]] = [
        [Eigenshift(plan="tone", alpha=0.0, apply=everywhere)],
        [Eigenshift(plan="tone", shift=-3.0), Subspace(plan="pca", components=4, apply=Scope("all"))],
        [Reft(plan="edit")],
        [],
        [Subspace(plan="pca", mode="keep", components=24, apply=Scope("all"), max_effort=0.3)],
        [
            Reft(plan="edit", positions="apply", when=When(concept="c", layer=1, above=0.0, on="token")),
            Clamp(concept="c", setpoint=2.0, layers=(1,)),
            Eigenshift(plan="tone", alpha=0.5, shift=2.0, control=True),
        ],
        [Subspace(plan="pca", mode="filter", components=1, position_0=True, apply=Scope("all"))],
    ]
    return [compile_program(each, bench) for each in lists]


def test_a_mixed_batch_equals_the_naive_loop(bench: Bench) -> None:
    pairs = [(PROMPTS[i % len(PROMPTS)], program) for i, program in enumerate(programs(bench))]
    for budget in (64, 7):
        requests = [Request(str(i), p, greedy(logprobs=0), g) for i, (p, g) in enumerate(pairs)]
        assert_naive(LLAMA.model, run(engine(max_step_tokens=budget), requests), pairs)


def test_in_a_batch_as_alone(bench: Bench) -> None:
    requests = [
        Request(str(i), PROMPTS[i % len(PROMPTS)], greedy(logprobs=0), program)
        for i, program in enumerate(programs(bench))
    ]
    together = run(engine(), requests)
    for request, one in zip(requests, together, strict=True):
        (alone,) = run(engine(), [request])
        assert one.tokens == alone.tokens
        if alone.receipt is not None:
            assert one.receipt is not None
            assert one.receipt.tokens_steered == alone.receipt.tokens_steered


@pytest.mark.parametrize(
    "method",
    [Eigenshift(plan="tone", strength=0.0), Subspace(plan="pca", strength=0.0), Reft(plan="edit", strength=0.0)],
    ids=lambda method: method.type,
)
def test_strength_zero_is_the_unsteered_output_bit_for_bit(bench: Bench, method: Any) -> None:
    program = compile_program([method], bench)
    still, plain, moved = run(
        engine(),
        [
            Request("still", PROMPTS[0], greedy(logprobs=0), program),
            Request("plain", PROMPTS[0], greedy(logprobs=0)),
            Request("moved", PROMPTS[0], greedy(logprobs=0), programs(bench)[1]),
        ],
    )
    assert (still.tokens, still.logprobs) == (plain.tokens, plain.logprobs)
    assert moved.tokens != plain.tokens


def test_the_receipt_measures_the_effort_and_the_guard_bounds_it(bench: Bench) -> None:
    free = compile_program([Eigenshift(plan="tone", shift=-3.0)], bench)
    bound = compile_program([Eigenshift(plan="tone", shift=-3.0)], bench, Guard(max_effort=0.01))
    loose, tight = run(engine(), [Request("a", PROMPTS[0], greedy(), free), Request("b", PROMPTS[0], greedy(), bound)])
    assert loose.receipt is not None
    assert tight.receipt is not None
    assert loose.receipt.effort["max"] > 0.01 * 1.01 > tight.receipt.effort["max"] > 0
    assert tight.receipt.effort["saturated_tokens"] == tight.receipt.tokens_steered
    assert dict(loose.receipt.tracking) == {}
