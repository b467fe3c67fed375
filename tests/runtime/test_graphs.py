"""A step that is recorded and replayed over fixed places equals the step that is not, whatever joins and leaves.

On a CPU a replay runs the forward pass anew; everything else is what a GPU does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import fields
from itertools import chain
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.utils import import_utils

from steering.plant.plant import Plant
from steering.program import Guard, Program, Scope, Term, Window
from steering.runtime import Engine, EngineSettings, Event, Finished, Request, Sampling, graphs
from steering.runtime.graphs import Graphs, sizes
from steering.runtime.launches import Launches
from steering.runtime.placement import Placement
from steering.types import Site, across, at, edit_at
from tests.plants import FAMILIES, WIDTH, tiny, tiny_tokenizer
from tests.runtime.naive import across_program, greedy, law, run
from tests.runtime.test_conditions import behind, gate
from tests.runtime.test_edits import blank, mask, program, sparse, turn
from tests.runtime.test_engine import LLAMA, PROMPTS
from tests.tolerances import RUNTIME


def engine(plant: Plant = LLAMA, *, has_graphs: bool = True, **settings: Any) -> Engine:
    return Engine(plant, EngineSettings(**{"max_batch": 16, "max_model_len": 96, "graphs": has_graphs} | settings))


def recorded(own: Engine) -> Graphs:
    """An engine's graphs."""
    assert own._runner._graphs is not None
    return own._runner._graphs


def assert_equal(done: Sequence[Finished], wanted: Sequence[Finished]) -> None:
    """Token for token and measurement for measurement."""
    for one, other in zip(done, wanted, strict=True):
        assert one.error is None
        assert one.tokens == other.tokens
        for got, want in zip(one.logprobs or (), other.logprobs or (), strict=True):
            assert got.logprob == pytest.approx(want.logprob, abs=RUNTIME["logprob"])
        assert (one.receipt is None) == (other.receipt is None)
        if one.receipt is not None and other.receipt is not None:
            assert flat(one.receipt.to_json()) == pytest.approx(flat(other.receipt.to_json()), **RUNTIME["receipt"])
        traced = [[r.projection for r in readings] for readings in one.trace or ()]
        expected = [[r.projection for r in readings] for readings in other.trace or ()]
        assert [len(row) for row in traced] == [len(row) for row in expected]
        assert list(chain(*traced)) == pytest.approx(list(chain(*expected)), **RUNTIME["receipt"], nan_ok=True)


def flat(value: object, name: str = "") -> dict[str, float]:
    """The numbers of a receipt by their place in it."""
    if isinstance(value, dict):
        return {k: v for key, each in value.items() for k, v in flat(each, f"{name}.{key}").items()}
    if isinstance(value, list):
        return {k: v for i, each in enumerate(value) for k, v in flat(each, f"{name}.{i}").items()}
    return {name: value} if isinstance(value, int | float) else {}


def mixed() -> list[Program]:
    """Laws, edits of each form, gates of both kinds, bounds, and requests with several of them, with none, and one that
    asks for the step's number."""
    site = ("resid_post", 1)
    everything = program(
        {
            edit_at("sparse", *site): sparse(WIDTH, 1, count=20, rest=3),  # type: ignore[arg-type]
            edit_at("mask", *site): mask(WIDTH, 2),  # type: ignore[arg-type]
            edit_at("turn", *site): turn(WIDTH, 3, adaptive=True),  # type: ignore[arg-type]
            at(*site): law(4),  # type: ignore[arg-type]
            across(2): law(5),
        },
        Scope("last", "all"),
    )
    gated = Program(
        (
            Term("a", "lqr", {across(1): law(1), across(2): law(2)}, Scope("all", "all"), gate=gate(1, 0.3)),
            Term("b", "add", {at("resid_pre", 2): law(3)}, Scope("all", "all"), gate=gate(2, -0.2, seed=6)),
        )
    )
    budget = Program(across_program(6, layers=(0, 1, 2), size=5.0).terms, Guard(max_effort=0.25))
    return [
        across_program(1),
        everything,
        Program(),
        gated,
        budget,
        behind(gate(2, 0.0, on="prompt"), across_program(2, layers=(0, 1, 2))),
        across_program(4, scope=Scope("none", Window((2, 6)))),
        across_program(5, rank=3),
    ]


def requests(programs: Sequence[Program], n: int = 12, **fields: Any) -> list[Request]:
    """One for each, some greedy and some not, that end one after the other."""
    return [
        Request(
            str(i),
            PROMPTS[i % len(PROMPTS)],
            Sampling(max_tokens=n + i, temperature=(0.0, 1.0)[i % 2], seed=i, ignore_eos=True, logprobs=i % 3),
            one,
            **fields,
        )
        for i, one in enumerate(programs)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_same_with_graphs(family: str) -> None:
    plant = Plant(tiny(family))
    asked = requests([across_program(1), Program(), across_program(2, layers=(0, 1, 2)), Program(), across_program(3)])
    own = engine(plant)
    assert_equal(run(own, asked), run(engine(plant, has_graphs=False), asked))
    assert len(recorded(own)) > 2


def test_every_form_of_steering_gives_the_same_with_graphs() -> None:
    """Sixteen requests that end in turn: batches of 16 down to 1, filled up to 16, 8 and not at all."""
    asked = requests([*mixed(), *mixed()], trace=True)
    own = engine()
    assert_equal(run(own, asked), run(engine(has_graphs=False), asked))
    assert {key.size for key in recorded(own)._graphs} == {1, 2, 3, 4, 8, 16}


def test_requests_that_join_and_leave_give_the_same_with_graphs() -> None:
    """Steps of prompts come between those with graphs, and the same frame comes again after another."""

    def served(own: Engine) -> list[Finished]:
        ends = dict[str, Finished]()

        def deliver(event: Event) -> None:
            if isinstance(event, Finished):
                ends[event.request_id] = event

        coming = iter(requests(mixed(), 9, trace=True))
        for step in range(80):
            if step % 3 == 0 and (arrived := next(coming, None)) is not None:
                own.submit(arrived, deliver)
            own.step()
        return [ends[name] for name in sorted(ends)]

    eager = served(engine(has_graphs=False))
    assert len(eager) == 8
    assert_equal(served(engine()), eager)


def test_a_guarded_request_and_its_twin_give_the_same_with_graphs() -> None:
    guarded = Program(across_program(5, layers=(0, 1, 2)).terms, Guard(max_kl=0.05))
    asked = requests([guarded, across_program(1), Program()])
    assert_equal(run(engine(), asked), run(engine(has_graphs=False), asked))


def test_modules_that_nobody_wants_are_left_out_of_a_graph_that_is_filled_up() -> None:
    asked = requests([blank("attn_out", 1), blank("attn_out", 1, 2), blank("attn_out", 0, 1)] * 2)
    own = engine()
    assert_equal(run(own, asked), run(engine(has_graphs=False), asked))
    found = {(key.size, site) for key in recorded(own)._graphs if key.shape for site in key.shape.blank}
    assert (8, Site("attn_out", 1)) in found, "six requests must be filled up to eight"


def test_sparse_linear_maps_read_columns_in_a_graph() -> None:
    program_ = program({edit_at("sparse", "mlp_act", 1): sparse(LLAMA.width_of(Site("mlp_act", 1)), 1)})
    asked = requests([program_] * 3)
    own, eager = engine(), engine(has_graphs=False)
    for each in (own, eager):
        each._runner._shortcuts.few = 4  # as on a GPU
    assert_equal(run(own, asked), run(eager, asked))
    assert any(key.shape and key.shape.sparse for key in recorded(own)._graphs)


def test_graphs_follow_the_bank_when_it_grows() -> None:
    """More slots, then wider laws, on routes that graphs exist for; one of the requests runs throughout."""
    stays = Request("stays", PROMPTS[0], greedy(70, logprobs=0), across_program(1))
    news = [Request(f"new {i}", PROMPTS[1], greedy(3), across_program(2 + i, rank=1 + i // 9)) for i in range(12)]

    def served(own: Engine) -> list[Finished]:
        ends = list[Event]()
        own.submit(stays, ends.append)
        for i, each in enumerate(news):
            own.submit(each, ends.append)
            for _ in range(5):
                own.step()
            eras.append({shape.eras for key in own_graphs(own) if (shape := key.shape) is not None})
            assert i < 2 or not eras[-1] or len({era[0] for era in eras[-1]}) == 1, "graphs of old tensors must go"
        while own.step():
            pass
        return sorted((e for e in ends if isinstance(e, Finished)), key=lambda e: e.request_id)

    def own_graphs(own: Engine) -> Iterator[graphs.Key]:
        return iter(() if own._runner._graphs is None else list(own._runner._graphs._graphs))

    eras: list[set[tuple[object, ...]]] = []
    eager = served(engine(has_graphs=False))
    eras.clear()
    assert_equal(served(engine()), eager)
    assert len({era for each in eras for era in each}) > 2, "the bank must have grown"


def test_a_replay_reads_fixed_places_and_asks_the_device_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a recording cannot have: tensors that come and go, numbers of the host, answers that the host waits for."""

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    called: set[str] = set()
    make, kept = Graphs._recorded, list[Any]()

    def watched(self: Graphs, size: int, work: Any, run: Any) -> Callable[[], None]:
        seen = list[tuple[int, ...]]()

        def noted(*step: Any) -> torch.Tensor:
            seen.append(addresses(*step[:2]))
            with Watched() if len(seen) == 2 else nullcontext():  # the first one may still prepare what it keeps
                logits: torch.Tensor = run(*step)
                return logits

        kept.append(seen)
        return make(self, size, work, noted)

    def addresses(place: Placement, work: Launches | None) -> tuple[int, ...]:
        tensors = [place.ids_T, place.position_T, place.at_T, place.table_NM, place.length_N]
        for owner in (work, None if work is None else work.gates):
            values = () if owner is None else (getattr(owner, each.name) for each in fields(owner))
            tensors += [value for value in values if isinstance(value, torch.Tensor)]
        return tuple(tensor.data_ptr() for tensor in tensors)

    monkeypatch.setattr(Graphs, "_recorded", watched)
    monkeypatch.setattr(import_utils, "is_cuda_stream_capturing", lambda: True)  # transformers checks its input else
    for family in FAMILIES:
        programs = mixed() if family == "llama" else [across_program(1), Program()]
        assert not any(done.error for done in run(engine(Plant(tiny(family))), requests(programs)))
    assert all(len(set(seen)) == 1 for seen in kept)
    assert sum(len(seen) > 2 for seen in kept) >= len(FAMILIES)
    assert "embedding" in called
    assert not called & {"item", "_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "_unique2"}


def test_a_graph_is_made_when_its_shape_has_come_a_few_times() -> None:
    own = engine()
    own._runner._graphs = patient = Graphs(16, 6, LLAMA.device, patience=3)
    for i, wanted in enumerate((0, 1, 1)):
        run(own, [Request(str(i), PROMPTS[0], greedy(3))])  # a step for the prompt, two for what follows
        assert len(patient) == wanted


def test_the_graphs_used_longest_ago_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST", 3)
    own, asked = engine(), requests(mixed())
    assert_equal(run(own, asked), run(engine(has_graphs=False), asked))
    assert len(recorded(own)) == 3
    assert next(reversed(recorded(own)._graphs)).size == 1


def test_what_cannot_be_recorded_runs_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Graphs, "_recorded", fails)
    own, asked = engine(), requests(mixed())
    with caplog.at_level(logging.WARNING, logger="setpoint"):
        done = run(own, asked)
    assert_equal(done, run(engine(has_graphs=False), asked))
    assert len(recorded(own)) == 0
    assert [r.getMessage() for r in caplog.records] == [
        "decode steps are not recorded as graphs: RuntimeError: operation not permitted when stream is capturing"
    ]


def test_sizes_reach_the_most_that_may_run() -> None:
    assert sizes(1) == (1,)
    assert sizes(5) == (1, 2, 3, 4, 5)
    assert sizes(20) == (1, 2, 3, 4, 8, 16, 20)
    assert sizes(32) == (1, 2, 3, 4, 8, 16, 24, 32)


def test_a_thread_serves_with_graphs() -> None:
    own = engine(Plant(tiny("llama"), tiny_tokenizer()), pipeline=True)
    own.start()
    done = own.generate(asked := requests(mixed()))
    own.stop()
    assert_equal(done, run(engine(has_graphs=False), asked))
