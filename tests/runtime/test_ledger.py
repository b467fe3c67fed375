"""A ledger gives every request what an account of its own, kept step by step, would have given it."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from steering.condition import Gate, When
from steering.program import Program, Scope
from steering.runtime.launches import Reading, write_sites
from steering.runtime.ledger import Ledger
from steering.runtime.receipt import Tally
from steering.runtime.scope import Frame, Spot, Steered, admitted
from tests.runtime.naive import across_program
from tests.tolerances import RUNTIME

ONE = across_program(1, layers=(0, 1, 2))
TWO = Program((*ONE.terms, *across_program(2, layers=(1,), scope=Scope("none")).terms))
ROUTES = tuple(ONE.laws)
GATE = Gate(When(concept="c", layer=0, above=0.0), torch.ones(4), 0.0, math.inf, 0.0, 1.0)


def frame(members: dict[str, list[int]], n_tokens: int, spots: tuple[Spot, ...] = (), seed: int = 0) -> Frame:
    """Each request at its tokens, channel 0 always and channel 1 by chance."""
    chance = np.random.default_rng(seed)
    found = []
    for name, tokens in members.items():
        active = np.ones((len(tokens), 2), dtype=bool)
        active[:, 1] = chance.random(len(tokens)) < 0.5
        found.append(Steered(name, np.array(tokens, dtype=np.int64), active))
    empty = np.zeros((n_tokens, len(ROUTES), 3, 2), dtype=np.float32)
    return Frame(ROUTES, np.zeros((3, n_tokens), np.int32), empty, np.full(n_tokens, np.inf), tuple(found), spots)


def reading(n_tokens: int, seed: int, gates: tuple[np.ndarray, ...] = ()) -> Reading:
    chance = np.random.default_rng(seed)
    effort = chance.random((len(write_sites(ROUTES)), n_tokens), dtype=np.float32)
    measured = chance.standard_normal((n_tokens, len(ROUTES), 2)).astype(np.float32)
    saturated = (chance.random(n_tokens) < 0.3).astype(np.int32)
    sums = (effort.sum(0, dtype=np.float64), effort.max(0))
    return Reading(ROUTES, write_sites(ROUTES), measured, effort, saturated, *sums, gates)


def flat(tally: Tally) -> list[float]:
    receipt = tally.receipt()
    means = [z for tracking in receipt.tracking.values() for z in tracking.by_layer]
    return [receipt.tokens_steered, *receipt.effort.values(), *means]


class Both:
    """A ledger's tallies, and those that are told every step themselves."""

    def __init__(self, *names: str) -> None:
        self.ledger, self.kept = Ledger(), {name: Tally(TWO) for name in names}
        self.told = {name: Tally(TWO) for name in names}

    def step(self, steady: Frame, measured: Reading) -> set[str]:
        lost = self.ledger.add(steady, measured, self.kept.__getitem__)
        acted = (admitted(steered, steady.spots, measured.gates) for steered in steady.steered)
        assert lost == {one.request_id for one in acted if not self.told[one.request_id].add(one, measured)}
        return lost

    def agree(self) -> None:
        for name, tally in self.kept.items():
            assert flat(tally) == pytest.approx(flat(self.told[name]), **RUNTIME["sums"], nan_ok=True), name


def test_sums_of_changing_frames_are_those_of_each_request_alone() -> None:
    both = Both("a", "b", "c")
    prompt = frame({"a": [0], "b": [1], "c": [2, 3, 4, 5]}, 6)
    steady = frame({"a": [0], "b": [1], "c": [2]}, 4, seed=1)  # row 3 is somebody who is not steered
    for step, one in enumerate([prompt, *[steady] * 5, prompt, *[steady] * 3, frame({"b": [0]}, 1, seed=2)]):
        assert not both.step(one, reading(len(one.budget_T), step))
        if step == 4:
            both.agree()  # reading a receipt closes nothing
    both.agree()
    assert both.kept["c"].receipt().tokens_steered == 2 * 4 + 8


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 5])
def test_whoever_is_not_finite_is_named_and_gets_nothing(bad: float, place: int) -> None:
    both = Both("a", "b")
    steady = frame({"a": [0, 3, 5], "b": [1]}, 6)
    for step in range(3):
        both.step(steady, reading(6, step))
    spoilt = reading(6, 9)
    spoilt.total_T[place] = bad
    assert both.step(steady, spoilt) == {"a"}
    assert both.kept["a"].receipt().tokens_steered == 9
    assert both.kept["b"].receipt().tokens_steered == 4
    both.agree()


def test_gates_decide_for_their_own_requests_alone() -> None:
    both = Both("a", "b")
    spots = (Spot("a", 0, GATE, np.array([0, 2]), np.array([True, True])),)
    steady = frame({"a": [0, 2], "b": [1]}, 3, spots)
    for step in range(6):
        gates = (np.array([(-1.0) ** step, 1.0 if step % 3 else -1.0]),)
        assert not both.step(steady, reading(3, step, gates))
    assert both.kept["a"].receipt().tokens_steered == 3 + 4
    assert both.kept["b"].receipt().tokens_steered == 6
    both.agree()


def test_what_no_token_spends_may_measure_anything() -> None:
    both = Both("a")
    steady = replace(frame({"a": [0]}, 2), steered=(Steered("a", np.array([0]), np.array([[True, False]])),))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(4):
            measured = reading(2, step)
            measured.measured_TPR[:, :, 1] = (math.inf, -math.inf)[step % 2]
            both.step(steady, measured)
        both.agree()
    assert not math.isnan(both.kept["a"].receipt().tracking["c"].mean)


def test_a_trace_needs_no_sums() -> None:
    steady, tally, ledger = frame({"a": [1]}, 2), Tally(TWO), Ledger()
    ledger.add(steady, reading(2, 0), lambda _: tally)
    assert [r.layer for r in tally.trace(steady.steered[0], reading(2, 0), 1)][:3] == [0, 1, 2]


def test_a_step_of_many_costs_little_more_than_of_one() -> None:
    """An account for each request took twenty times as long at 64 of them as at 1."""

    def seconds(n: int) -> float:
        tallies = {str(i): Tally(TWO) for i in range(n)}
        ledger, steady = Ledger(), frame({str(i): [i] for i in range(n)}, n)
        measured = reading(n, 0)
        ledger.add(steady, measured, tallies.__getitem__)
        runs = []
        for _ in range(30):
            start = time.perf_counter()
            ledger.add(steady, measured, tallies.__getitem__)
            runs.append(time.perf_counter() - start)
        return sorted(runs)[len(runs) // 4]

    assert seconds(64) < 5 * seconds(1)
