"""What is prepared is what the laws say, known by shape, within a bound on bytes, from any thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from steering.edit import Mask, Sparse
from steering.law import Law
from steering.plant.plant import Plant
from steering.program import Program, Term
from steering.runtime import Engine, EngineSettings, Request
from steering.runtime.programs import Prepared, Programs
from steering.types import across, edit_at
from tests.plants import tiny
from tests.runtime.naive import across_program, greedy, law

CPU = torch.device("cpu")
SIZE = Prepared.of(across_program(1)).n_bytes


def test_a_prepared_program_holds_what_its_laws_have_resident() -> None:
    edits = {
        edit_at("mask", "mlp_out", 0): Mask.of(torch.rand(6)),
        edit_at("sparse", "mlp_out", 1): Sparse.of(torch.rand(6), count=3),
        across(1): law(1, rank=2),
    }
    program = Program((Term("x", "test", edits), *across_program(2).terms))
    prepared = Prepared.of(program)
    assert prepared.rank == program.rank
    held = prepared.tensors(CPU)
    assert set(held) == set(program.laws)
    for route, acting in program.laws.items():
        for name, tensor in acting.resident().items():
            assert held[route][name].dtype == tensor.dtype
            assert torch.equal(held[route][name], tensor), (route, name)


def test_a_shape_is_prepared_once_whatever_the_knobs() -> None:
    known, one = Programs(), across_program(1)
    term = one.terms[0]
    other = Program((replace(term, laws={r: replace(x, setpoint=x.setpoint + 9) for r, x in term.laws.items()}),))
    assert known.of(one) is known.of(other)
    assert other in known
    assert across_program(2) not in known
    assert (len(known), known.n_bytes) == (1, SIZE)


def test_what_was_used_longest_ago_is_forgotten_beyond_the_limit() -> None:
    known = Programs(3 * SIZE)
    one, two, three, four = (across_program(i) for i in range(4))
    for program in (one, two, three, one, four):
        known.of(program)
    assert [program in known for program in (one, two, three, four)] == [True, False, True, True]
    assert known.n_bytes == 3 * SIZE
    wide = across_program(9, rank=8)
    assert known.of(wide).n_bytes > 3 * SIZE
    assert (wide in known, len(known)) == (False, 3), "one that is too large for all pushes out none"
    assert known.of(two).tensors(CPU)[across(1)]["probe"].equal(two.laws[across(1)].probe)  # type: ignore[union-attr]


def test_many_threads_leave_a_sound_account() -> None:
    known = Programs(5 * SIZE)
    programs = [across_program(i) for i in range(12)]
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: known.of(programs[i * 7 % 12]), range(240)))
    assert all(m.n_bytes == SIZE for m in made)
    assert (len(known), known.n_bytes) == (5, 5 * SIZE)


def test_nothing_is_worked_out_on_the_engines_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of 32 layers takes 13 ms to work out: every request of the batch would wait for it."""
    threads: list[str] = []
    for name in ("resident", "knobs"):
        own = getattr(Law, name)

        def noted(law: Law, *args: int, own: Callable[..., object] = own) -> object:
            threads.append(threading.current_thread().name)
            return own(law, *args)

        monkeypatch.setattr(Law, name, noted)
    engine = Engine(Plant(tiny("llama")), EngineSettings(max_batch=2, max_model_len=32))
    engine.start()
    try:
        requests = [Request(str(i), (3, 4, 5), greedy(3), across_program(i)) for i in range(4)]
        done = engine.generate(requests)
    finally:
        engine.stop()
    assert all(one.receipt is not None and one.reason == "length" for one in done)
    assert set(threads) == {threading.current_thread().name}
