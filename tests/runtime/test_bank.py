"""Programs keep their slot while somebody holds them, and leave nothing behind."""

from __future__ import annotations

import gc
import math
from dataclasses import replace

import pytest
import torch

from steering.errors import BankFull, CapacityError
from steering.program import Program, Term
from steering.runtime import bank as bank_module
from steering.runtime.bank import Bank, Knobs, Tensors
from steering.types import across, at
from tests.runtime.naive import across_program, law

CPU = torch.device("cpu")


def test_a_slot_holds_the_programs_laws_and_row_zero_nothing() -> None:
    bank, program = Bank(4, CPU), across_program(1, rank=2)
    slot = bank.acquire(program)
    for route, laws in program.laws.items():
        tensors = bank.routes[route]
        assert torch.equal(tensors["probe"][slot], laws.probe)
        assert torch.equal(tensors["gain"][slot], laws.gain)
        assert torch.allclose(tensors["norm"][slot], laws.gain.norm(dim=-1))
        assert torch.isinf(tensors["limit"]).all()
        assert not tensors["probe"][0].any()
        assert not tensors["gain"][0].any()


def test_a_sweep_over_knobs_shares_one_slot() -> None:
    bank, program = Bank(1, CPU), across_program(1)
    term = program.terms[0]
    other = Program((replace(term, laws={r: replace(x, setpoint=x.setpoint + 9) for r, x in term.laws.items()}),))
    assert bank.acquire(program) == bank.acquire(other)
    assert len(bank) == 1
    bank.release(program)
    with pytest.raises(BankFull):  # the other one still holds it
        bank.acquire(across_program(2))
    bank.release(other)
    assert bank.acquire(across_program(2)) == 1


def test_a_program_that_does_not_fit_in_memory_leaves_the_bank_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, held = Bank(4, CPU), across_program(1)
    bank.acquire(held)
    before = {route: laws["probe"].clone() for route, laws in bank.routes.items()}
    wide = Program((*across_program(2).terms, *across_program(3).terms))

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Tensors, "grown", full)
        with pytest.raises(torch.OutOfMemoryError):
            bank.acquire(wide)
    assert (bank.rank, len(bank)) == (1, 1)
    assert all(torch.equal(bank.routes[route]["probe"], probe) for route, probe in before.items())
    assert bank.acquire(wide) == 2


def test_what_does_nothing_takes_no_slot() -> None:
    bank = Bank(1, CPU)
    off = Program((Term("x", "add", {across(1): 0.0 * law(1)}),))
    assert bank.acquire(Program()) == bank.acquire(off) == 0
    bank.release(off)
    assert len(bank) == 0


def test_the_longest_unused_goes_first_and_held_ones_stay() -> None:
    bank = Bank(2, CPU)
    a, b, c = (across_program(i) for i in (1, 2, 3))
    slot_a, slot_b = bank.acquire(a), bank.acquire(b)
    with pytest.raises(BankFull, match="2 program slots"):
        bank.acquire(c)
    bank.release(b)
    bank.release(a)
    bank.acquire(a)  # b is now the longest unused
    bank.release(a)
    assert bank.acquire(c) == slot_b
    assert bank.acquire(a) == slot_a


def test_an_evicted_program_leaves_no_trace() -> None:
    bank = Bank(1, CPU)
    old = Program((Term("x", "add", {across(1): law(1), at("mlp_out", 0): law(2)}),))
    bank.acquire(old)
    bank.release(old)
    new = across_program(5, layers=(2,))
    slot = bank.acquire(new)
    assert set(bank.routes) == {across(2)}
    keep = Bank(2, CPU)
    keep.acquire(across_program(5, layers=(1,)))
    keep.acquire(old)
    keep.release(old)
    slot = keep.acquire(new)
    assert at("mlp_out", 0) not in keep.routes
    assert not keep.routes[across(1)]["probe"][slot].any()
    assert not keep.routes[across(1)]["norm"][slot].any()


def test_a_route_is_as_wide_as_its_own_laws() -> None:
    bank = Bank(4, CPU)
    bank.acquire(across_program(1, layers=(1,)))
    bank.acquire(Program((Term("wide", "add", {at("final"): law(3, rank=20)}),)))
    assert bank.rank == 32
    assert {str(route): tensors["probe"].shape[1] for route, tensors in bank.routes.items()} == {
        str(across(1)): 1,
        str(at("final")): 20,
    }


def test_a_wider_program_widens_its_routes_and_keeps_the_rest() -> None:
    bank, narrow = Bank(4, CPU), across_program(1)
    slot = bank.acquire(narrow)
    bank.acquire(across_program(2, rank=3))
    assert bank.rank == 4
    for route, laws in narrow.laws.items():
        tensors = bank.routes[route]
        assert tensors["probe"].shape[1] == 3
        assert torch.equal(tensors["probe"][slot, :1], laws.probe)
        assert not tensors["gain"][slot, 1:].any()


def test_knobs_are_the_programs_numbers() -> None:
    program = Program((*across_program(1, layers=(1,)).terms, *across_program(2, layers=(2,), rank=2).terms))
    knobs = Knobs.of(program)
    assert knobs.routes == (across(1), across(2))
    assert knobs.terms_NR.tolist() == [[True, False, False], [False, True, True]]
    assert knobs.values_P3R[0, 1].tolist() == [1, 0, 0], "idle channels have no strength"
    assert knobs.values_P3R[1, 0].tolist() == pytest.approx(program.laws[across(2)].setpoint.tolist())


def test_three_hundred_are_resident_two_thousand_known_and_none_is_in_the_way_of_another() -> None:
    bank = Bank(300, CPU)
    programs = [across_program(i, layers=(1,)) for i in range(2000)]
    held = programs[:150]
    slots = {bank.acquire(program) for program in held}
    for program in programs[150:]:
        bank.acquire(program)
        bank.release(program)
    assert (len(bank), len(bank.programs)) == (300, 2000)
    assert {bank.acquire(program) for program in held} == slots, "what is held stays where it is"
    probe_SRD, gain_SRE = (bank.routes[across(1)][name] for name in ("probe", "gain"))
    for program in (*held, *programs[-150:]):
        slot, own = bank.acquire(program), program.laws[across(1)]
        assert torch.equal(probe_SRD[slot], own.probe)  # type: ignore[union-attr]
        assert torch.equal(gain_SRE[slot], own.gain)  # type: ignore[union-attr]
    with pytest.raises(BankFull):
        bank.acquire(programs[200])


def test_memory_follows_the_programs_that_are_there() -> None:
    bank = Bank(256, CPU)
    for i in range(20):
        bank.acquire(across_program(i, layers=(1,)))
    bank.acquire(across_program(99, layers=(2,)))
    assert [len(bank.routes[across(layer)]["probe"]) for layer in (1, 2)] == [33, 33]
    assert len(Bank(256, CPU).routes) == 0
    few = Bank(256, CPU)
    few.acquire(across_program(1))
    assert len(few.routes[across(1)]["probe"]) == 9


def test_slots_that_are_free_hold_nothing_and_the_lowest_goes_first() -> None:
    bank, programs = Bank(3, CPU), [across_program(i, rank=2) for i in range(3)]
    assert [bank.acquire(program) for program in programs] == [1, 2, 3]
    for program in programs:
        bank.release(program)
    assert bank.acquire(across_program(7)) == 1
    tensors = bank.routes[across(1)]
    assert not tensors["gain"][1, 1].any(), "the channel of who was there before"
    assert tensors["limit"][1].tolist() == [math.inf] * 2
    assert tensors["knee"][1].tolist() == [-math.inf] * 2


def test_what_does_not_fit_in_memory_is_refused_with_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank_module, "SMALL", 0)
    bank, held, idle = Bank(40, CPU), across_program(1, layers=(1,)), across_program(2, layers=(2,))
    monkeypatch.setattr(bank_module, "spare_bytes", lambda _: 10**6)
    for program in (held, idle):
        bank.acquire(program)
    bank.release(idle)
    probe = bank.routes[across(1)]["probe"].clone()
    monkeypatch.setattr(bank_module, "spare_bytes", lambda _: 10**5)
    with pytest.raises(CapacityError, match=r"needs 0\.2 MB .* 0\.1 MB are free") as refused:
        bank.acquire(across_program(3, layers=(1,), rank=64))
    assert not isinstance(refused.value, BankFull), "waiting would not help"
    assert (len(bank), set(bank.routes)) == (1, {across(1)}), "what nobody used had to go"
    assert torch.equal(bank.routes[across(1)]["probe"], probe)
    monkeypatch.setattr(bank_module, "spare_bytes", lambda _: 0)
    others = [across_program(10 + i, layers=(1,)) for i in range(7)]
    for program in others:
        bank.acquire(program)
    with pytest.raises(BankFull, match="every slot that has room"):  # the ninth needs more rows
        bank.acquire(across_program(20, layers=(1,)))
    bank.release(others[0])
    assert bank.acquire(across_program(20, layers=(1,))) == 2


def test_what_is_prepared_is_not_worked_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, program = Bank(2, CPU), across_program(1)
    bank.prepare(program)
    own = type(program.laws[across(1)])
    monkeypatch.setattr(own, "resident", lambda _: pytest.fail("on the engine's thread"))
    monkeypatch.setattr(own, "knobs", lambda *_: pytest.fail("on the engine's thread"))
    assert bank.acquire(program) == 1
    assert bank.knobs(program) is bank.knobs(program)
    assert program.fingerprint
    assert bank.knobs(program).values_P3R.shape == (2, 3, 1)


def test_knobs_go_with_their_program() -> None:
    bank, program = Bank(2, CPU), across_program(1)
    bank.prepare(program)
    assert len(bank._knobs) == 1
    del program
    gc.collect()
    assert len(bank._knobs) == 0
    assert len(bank.programs) == 1, "its shape stays known"
