"""Scopes select what their definition says; fingerprints tell what is resident from what is a knob."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steering.errors import SpecError
from steering.law import Law
from steering.methods import Ablate, Lqr
from steering.program import MAX_POSITIONS, Guard, Positions, Program, Scope, Term, Window
from tests.toy import toy

BENCH = toy()
LQR = Lqr(concept="tone", setpoint=1.0)


def program(*interventions: Any, guard: Guard | None = None) -> Program:
    return Program(tuple(i.compile(BENCH) for i in interventions), guard or Guard())


# Scopes


def ends(length: int) -> st.SearchStrategy[int]:
    return st.integers(-length - 2, length + 2)


@given(st.integers(0, 9).flatmap(lambda n: st.tuples(st.just(n), st.lists(ends(n), min_size=1, max_size=6))))
def test_positions_select_themselves(case: tuple[int, list[int]]) -> None:
    length, chosen = case
    mask = Scope(prompt=Positions(tuple(chosen))).prompt_mask(length)
    assert mask.tolist() == [any(p in (i, i - length) for p in chosen) for i in range(length)]


@given(st.integers(0, 9).flatmap(lambda n: st.tuples(st.just(n), ends(n), ends(n))))
def test_a_prompt_window_is_half_open_and_counts_negative_ends_from_the_end(case: tuple[int, int, int]) -> None:
    length, start, stop = case
    if (start < 0) == (stop < 0) and start > stop:
        with pytest.raises(SpecError, match="a <= b"):
            Window((start, stop))
        return
    first, last = (end + length if end < 0 else end for end in (start, stop))
    mask = Scope(prompt=Window((start, stop))).prompt_mask(length)
    assert mask.tolist() == [first <= i < last for i in range(length)]


@pytest.mark.parametrize(("prompt", "expected"), [("none", [0, 0, 0]), ("last", [0, 0, 1]), ("all", [1, 1, 1])])
def test_named_prompt_scopes(prompt: Any, expected: list[int]) -> None:
    assert Scope(prompt=prompt).prompt_mask(3).tolist() == [bool(e) for e in expected]
    assert Scope(prompt=prompt).prompt_mask(0).tolist() == []


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 12))
def test_a_generation_window_is_half_open(start: int, length: int, step: int) -> None:
    assert Scope(generation=Window((start, start + length))).steers_step(step) == (start <= step < start + length)


def test_named_generation_scopes() -> None:
    assert all(Scope(generation="all").steers_step(step) for step in (0, 1, 1000))
    assert not any(Scope(generation="none").steers_step(step) for step in (0, 1, 1000))


@pytest.mark.parametrize(
    ("make", "param"),
    [
        (lambda: Scope(prompt="lsat"), "prompt"),  # type: ignore[arg-type]
        (lambda: Scope(prompt=[1]), "prompt"),  # type: ignore[arg-type]
        (lambda: Scope(generation="last"), "generation"),  # type: ignore[arg-type]
        (lambda: Scope(generation=Positions((1,))), "generation"),  # type: ignore[arg-type]
        (lambda: Scope(generation=Window((-2, -1))), "generation.window"),
        (lambda: Window((3, 1)), "window"),
        (lambda: Window((3,)), "window"),  # type: ignore[arg-type]
        (lambda: Window((0, 1.5)), "window"),  # type: ignore[arg-type]
        (lambda: Positions(()), "positions"),
        (lambda: Positions((0.5,)), "positions"),  # type: ignore[arg-type]
        (lambda: Positions(tuple(range(MAX_POSITIONS + 1))), "positions"),
        (lambda: Guard(max_effort=-1.0), "max_effort"),
        (lambda: Guard(max_effort=math.nan), "max_effort"),
        (lambda: Guard(max_kl=math.inf), "max_kl"),
    ],
)
def test_a_selector_that_would_select_nothing_is_refused_by_name(make: Any, param: str) -> None:
    with pytest.raises(SpecError) as caught:
        make()
    assert caught.value.param == param


def test_the_guard_s_budget() -> None:
    assert Guard().budget == math.inf
    assert Guard(max_effort=0.0).budget == 0.0
    assert Guard(max_effort=0.5).budget == 0.5


# Fingerprints


KNOBS = [
    program(replace(LQR, setpoint=1.5)),
    program(replace(LQR, strength=0.5)),
    program(replace(LQR, max_effort=0.3)),
    program(replace(LQR, apply=Scope(prompt="all"))),
    program(replace(LQR, apply=Scope(generation=Window((0, 3))))),
    program(LQR, guard=Guard(max_effort=0.5)),
    program(LQR, guard=Guard(max_kl=0.5)),
]


@pytest.mark.parametrize("swept", KNOBS)
def test_a_knob_changes_the_fingerprint_and_not_what_is_resident(swept: Program) -> None:
    base = program(LQR)
    assert swept.shape == base.shape
    assert swept.fingerprint != base.fingerprint


def test_knobs_are_told_from_one_another() -> None:
    assert len({swept.fingerprint for swept in KNOBS}) == len(KNOBS)


@pytest.mark.parametrize(
    "other",
    [
        program(replace(LQR, layers=(1, 2))),
        program(replace(LQR, gains="identity")),
        program(LQR, LQR),
        program(Ablate(concept="tone")),
    ],
)
def test_another_law_is_resident_apart(other: Program) -> None:
    assert other.shape != program(LQR).shape
    assert other.fingerprint != program(LQR).fingerprint


def test_units_and_target_are_part_of_what_is_reported() -> None:
    """Equal laws whose receipts differ are two programs of one shape."""
    (term,) = program(LQR).terms
    assert Program((replace(term, target=0.0),)).fingerprint != Program((term,)).fingerprint
    assert Program((replace(term, units="absolute"),)).shape == Program((term,)).shape


def test_fingerprints_do_not_depend_on_the_process() -> None:
    assert program(LQR).fingerprint == program(LQR).fingerprint
    assert Program().fingerprint == Program().fingerprint
    assert program(LQR).fingerprint.startswith("sha256:")


# Composition


def test_each_term_owns_its_channels_on_every_route() -> None:
    both = program(LQR, Ablate(concept="tone", layers=(2,)), LQR)
    assert both.channels == (slice(0, 1), slice(1, 2), slice(2, 3))
    assert both.rank == 3
    assert all(law.rank == 3 for law in both.laws.values())
    assert Program().laws == {}
    assert Program().channels == ()


def test_a_program_acts_when_a_term_does() -> None:
    assert not Program().acts
    assert program(LQR).acts
    assert not program(replace(LQR, strength=0.0)).acts
    assert program(replace(LQR, strength=0.0), LQR).acts
    assert not program(replace(LQR, apply=Scope("none", "none"))).acts
    assert program(replace(LQR, apply=Scope("none", "all"))).acts
    assert not Term("x", "none", {}).acts


def test_laws_are_made_resident_in_float32() -> None:
    law = Law.of(torch.ones(3, dtype=torch.float64) / 3, 0.1, torch.ones(3, dtype=torch.float64)).to(torch.float32)
    assert {law.probe.dtype, law.setpoint.dtype, law.cap.dtype, law.strength.dtype} == {torch.float32}
