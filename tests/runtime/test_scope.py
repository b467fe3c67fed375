"""A frame says, token by token, what the scopes say; the naive loop in test_engine.py is the oracle of the whole."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from steering.program import Guard, Positions, Program, Scope, Window
from steering.runtime.bank import Knobs
from steering.runtime.request import Request
from steering.runtime.scheduler import Batch, Sequence
from steering.runtime.scope import Frame, Resolver, Steering, launch_order, resolve
from steering.types import Route, Site, across, at
from tests.runtime.naive import across_program


def sequence(name: str, n_prompt: int, n_generated: int = 0, n_rows: int = 1) -> Sequence:
    made = Sequence(Request(name, tuple(range(n_prompt))), n_rows)
    made.tokens += [0] * n_generated
    return made


def steering(program: Program, n_prompt: int, slot: int = 3) -> Steering:
    return Steering.of(program, slot, Knobs.of(program), n_prompt)


def test_masks_follow_absolute_positions_and_steps_across_chunks() -> None:
    scopes = (Scope(Positions((0, -1)), Window((1, 3))), Scope("none", "all"))
    program = Program(tuple(term for i, s in enumerate(scopes) for term in across_program(i, (1,), s).terms))
    one = steering(program, 4)
    whole = one.active(0, 9)
    wanted = [[True, False], [False, False], [False, False], [True, False], *([s in (1, 2), True] for s in range(5))]
    assert whole.tolist() == wanted
    assert one.always_R is None
    for a in range(9):
        for b in range(a + 1, 10):
            assert np.array_equal(one.active(a, b - a), whole[a:b])


def test_a_frame_places_slots_strengths_and_budgets() -> None:
    a = replace(across_program(1, (1, 2), Scope("last")), guard=Guard(max_effort=0.5))
    b = across_program(2, (2,), Scope("all"), rank=2)
    first, second, plain = sequence("a", 3), sequence("b", 2, n_rows=2), sequence("p", 2)
    batch = Batch.pack([(first, 0, 3), (second, 0, 2), (plain, 0, 2)], 16)
    frame = resolve(batch, {"a": steering(a, 3, 5), "b": steering(b, 2, 6)}, rank=4)
    assert frame is not None
    assert frame.routes == (across(1), across(2))
    assert frame.slot_PT.tolist() == [[0, 0, 5, 0, 0, 0, 0, 0, 0], [0, 0, 5, 6, 6, 0, 0, 0, 0]]
    assert frame.budget_T.tolist() == [math.inf] * 2 + [0.5] + [math.inf] * 6
    assert frame.knobs_TP3R[:, 1, 1].tolist() == [[0] * 4] * 2 + [[1, 0, 0, 0]] + [[1, 1, 0, 0]] * 2 + [[0] * 4] * 4
    assert np.allclose(frame.knobs_TP3R[3, 1, 0, :2], b.laws[across(2)].setpoint)
    assert [(s.request_id, s.tokens_K.tolist()) for s in frame.steered] == [("a", [2]), ("b", [3, 4])]


def test_nothing_in_scope_means_no_frame() -> None:
    one = sequence("a", 6)
    steerings = {"a": steering(across_program(1, scope=Scope("last")), 6)}
    assert resolve(Batch.pack([(one, 0, 5)], 16), steerings, 1) is None
    assert resolve(Batch.pack([(one, 5, 1)], 16), steerings, 1) is not None
    assert resolve(Batch.pack([(one, 5, 1)], 16), {}, 1) is None


def test_an_infinite_strength_out_of_scope_is_zero() -> None:
    program = across_program(1, (1,), Scope(Positions((0,)), "none"))
    other = across_program(2, (1,), Scope("all"))
    laws = {route: math.inf * law for route, law in program.terms[0].laws.items()}
    both = Program((replace(program.terms[0], laws=laws), *other.terms))
    frame = resolve(Batch.pack([(sequence("a", 2), 0, 2)], 16), {"a": steering(both, 2)}, 2)
    assert frame is not None
    assert frame.knobs_TP3R[:, 0, 1].tolist() == [[math.inf, 1], [0, 1]]


def test_a_steady_step_reuses_its_frame_and_others_do_not() -> None:
    resolver = Resolver()
    steady, moving = across_program(1), across_program(2, scope=Scope("last", Window((0, 2))))
    a, b = sequence("a", 2, 3), sequence("b", 2, 3)
    steerings = {"a": steering(steady, 2)}

    def step(position: int, *sequences: Sequence) -> object:
        return resolver(Batch.pack([(s, position, 1) for s in sequences], 16), steerings, 1)

    first = step(2, a, b)
    assert first is not None
    assert step(3, a, b) is first
    assert step(3, a) is not first
    assert step(1, a) is not step(1, a), "a prompt token is not a decode step"
    a.counted = 4
    again, new = step(3, a, b), step(4, a, b)
    assert isinstance(again, Frame)
    assert isinstance(new, Frame)
    assert not again.steered, "what is read again after an interruption is in the receipt already"
    assert new.steered
    steerings["a"] = steering(steady, 2)
    assert step(3, a, b) is not first, "another request of the same id"
    steerings["a"] = steering(moving, 2)
    assert step(3, a) is not None
    assert step(4, a) is None


def test_a_law_that_reads_where_it_writes_goes_first() -> None:
    far = Route(Site("attn_in", 0), Site("resid_post", 1))
    routes = sorted([across(1), far, at("resid_post", 1), across(0)], key=launch_order)
    assert routes == [across(0), at("resid_post", 1), far, across(1)]
