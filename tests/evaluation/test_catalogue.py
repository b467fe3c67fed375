"""The catalogue on the embedded model: every method in one batch says what it says alone, and has its row."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from steering.demo import CONCEPTS, MODEL
from steering.demo.contrast import prompts
from steering.demo.plans import READY_PLANS
from steering.errors import SpecError
from steering.evaluation.catalogue import COLUMNS, Catalogue, RandomBench, _Asked, _effect, run_catalogue, table
from steering.evaluation.entries import ENTRIES
from steering.plan import AdapterPlan, ReftPlan
from steering.plant.plant import Plant
from steering.program import Program
from steering.registry import REGISTRY
from steering.runtime import Engine, EngineSettings, Finished, Request, Sampling, Usage
from steering.store import Shelf, Store


@pytest.fixture(scope="module")
def plant() -> Plant:
    return Plant.load(MODEL, dtype="float32")


@pytest.fixture(scope="module")
def shelf(plant: Plant) -> Shelf:
    return Shelf(Store(CONCEPTS), model=plant.fingerprint, depth=plant.depth, width=plant.width, caution=plant.caution)


@pytest.fixture(scope="module")
def engine(plant: Plant) -> Iterator[Engine]:
    engine = Engine(plant, EngineSettings(max_batch=len(ENTRIES) + 1, max_model_len=256, program_slots=64))
    yield engine
    engine.stop()


def test_every_method_has_a_row_and_every_ready_plan_is_used() -> None:
    assert {entry.type for entry in ENTRIES} == set(REGISTRY)
    assert {entry.fields["plan"] for entry in ENTRIES if "plan" in entry.fields} == set(READY_PLANS)
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES) >= 24


def test_a_batch_in_which_each_request_has_another_method_says_what_each_says_alone(
    plant: Plant, shelf: Shelf, engine: Engine
) -> None:
    chats = prompts("positive", "neutral", "test", len(ENTRIES))
    requests = [
        Request(
            entry.name,
            tuple(plant.encode(chat)),
            Sampling(max_tokens=24, temperature=0.8, seed=n, ignore_eos=True, logprobs=0),
            entry.program(entry.strengths[1], shelf),
        )
        for n, (entry, chat) in enumerate(zip(ENTRIES, chats, strict=True))
    ]
    together = engine.generate([*requests, Request("plain", requests[0].prompt, requests[0].sampling)])
    assert all(done.error is None for done in together)
    for request, done in zip(requests, together, strict=False):
        (alone,) = engine.generate([request])
        (plain,) = engine.generate([Request("plain", request.prompt, request.sampling)])
        assert alone.tokens == done.tokens, request.id
        assert alone.receipt is not None
        assert done.receipt is not None
        assert alone.receipt.effort == pytest.approx(dict(done.receipt.effort), rel=1e-3), request.id
        assert done.receipt.tokens_steered > 0
        moved = [a.logprob - b.logprob for a, b in zip(done.logprobs or (), plain.logprobs or (), strict=True)]
        assert plain.tokens != done.tokens or max(map(abs, moved)) > 1e-4, f"{request.id} does nothing"


def test_a_table_of_few_rows(plant: Plant, shelf: Shelf, engine: Engine) -> None:
    few = Catalogue(methods=("lqr", "skip_layers"), n_prompts=4, max_tokens=6, batch=2)
    heard: list[float] = []
    rows = run_catalogue(plant, shelf, engine, few, lambda _, done: heard.append(done))
    assert heard == sorted(heard)
    assert heard[-1] == 1.0
    assert [row.method for row in rows] == ["none", *["lqr"] * 6, "none", *["skip_layers"] * 6]
    assert [row.is_control for row in rows[1:7]] == [False, True] * 3
    assert all(row.failed == 0 and row.n == 4 and (row.is_control or row.speed > 0) for row in rows)
    base = next(row for row in rows if row.task == "keep")
    assert (base.method, base.effect, base.perplexity_ratio, base.effort) == ("none", 1.0, 1.0, 0.0)
    told = table(rows)
    assert all(len(line) == len(COLUMNS) for line in told)
    assert len(told) == 8


def test_what_is_kept_counts_over_the_longer_answer() -> None:
    (entry,) = (entry for entry in ENTRIES if entry.name == "skip_layers")

    def answered(*tokens: int) -> Finished:
        return Finished("a", "stop", "", tokens, Usage(1, len(tokens)))

    asked = _Asked([None] * 3, [(1,)] * 3, [answered(1, 2, 3, 4)] * 2 + [answered()], 1.0, None)  # type: ignore[arg-type]
    effect, _ = _effect(entry, asked, [answered(1), answered(1, 2, 9, 4, 5), answered(7)])
    assert effect == pytest.approx((1 / 4 + 3 / 5 + 0) / 3)


def test_what_cannot_be_run_is_refused_by_name() -> None:
    for name, value in (("methods", ("nonesuch",)), ("n_prompts", 0), ("max_tokens", 0), ("batch", 0)):
        with pytest.raises(SpecError) as caught:
            Catalogue(**{name: value})  # type: ignore[arg-type]
        assert caught.value.param == name


def test_a_random_concept_keeps_its_sizes_and_its_starting_error(plant: Plant, shelf: Shelf) -> None:
    mean_LD = torch.randn(plant.depth + 1, plant.width, generator=torch.Generator().manual_seed(0))
    random, true = RandomBench(shelf, mean_LD, 0).concept("positive"), shelf.concept("positive")
    for kind in true.gains:
        torch.testing.assert_close(random.gains[kind].norm(dim=-1), true.gains[kind].norm(dim=-1))
    assert float((random.direction * true.direction).sum(-1).abs().max()) < 0.4
    errors = [(concept.direction * mean_LD).sum(-1) - concept.origin for concept in (random, true)]
    torch.testing.assert_close(*errors, rtol=1e-4, atol=1e-4)


def test_random_plans_are_whole_and_as_long(plant: Plant, shelf: Shelf) -> None:
    random = RandomBench(shelf, torch.zeros(plant.depth + 1, plant.width), 0)
    for name, kind in (("tone-reft", ReftPlan), ("tone-adapter", AdapterPlan)):
        drawn, true = random.plan(name, kind), shelf.plan(name, kind)
        assert kind.from_artifact(drawn.artifact()).name == name
        assert drawn.artifact().fingerprint != true.artifact().fingerprint
    assert Program().acts is False
