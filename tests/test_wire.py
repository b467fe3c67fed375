"""A program that was sent steers bit for bit as the one that was packed; what is not one is refused."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from steering.condition import When
from steering.errors import ArtifactCorrupt
from steering.methods import Ablate, Lqr, compile_program
from steering.program import Guard, Positions, Program, Scope, Term, Window
from steering.registry import REGISTRY
from steering.wire import pack, unpack
from tests.methods.test_contract import BENCH, CONSTANT, make
from tests.toy import run, states


def same(first: object, second: object) -> bool:
    """Equal in every bit, tensors and dtypes included."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    return type(first) is type(second) and first == second


def assert_same_term(first: Term, second: Term) -> None:
    for name in ("label", "type", "scope", "units", "target", "gauges", "scopes", "is_whole"):
        assert getattr(first, name) == getattr(second, name), name
    assert list(first.laws) == list(second.laws)
    for route, law in first.laws.items():
        other = second.laws[route]
        assert all(same(getattr(law, f.name), getattr(other, f.name)) for f in fields(law)), route
    assert (first.gate is None) == (second.gate is None)
    if first.gate is not None and second.gate is not None:
        assert all(same(getattr(first.gate, f.name), getattr(second.gate, f.name)) for f in fields(first.gate))


@pytest.mark.parametrize("cls", REGISTRY.values(), ids=REGISTRY)
def test_every_method_arrives_as_it_was_sent(cls: Any) -> None:
    sent = compile_program([make(cls)] if cls.type in CONSTANT else [make(cls), make(cls, strength=0.25)], BENCH)
    received = unpack(pack(sent))
    assert received.fingerprint == sent.fingerprint
    assert received.shape == sent.shape
    for first, second in zip(sent.terms, received.terms, strict=True):
        assert_same_term(first, second)
    x = states(3, BENCH.width).float()
    A_LDD = BENCH.A_LDD.float()
    for one, other in zip(sent.terms, received.terms, strict=True):
        assert all(map(torch.equal, run(A_LDD, one.laws, x)[1], run(A_LDD, other.laws, x)[1]))


@pytest.mark.parametrize("prompt", ["none", "all", Positions((0, -2)), Window((-3, 2))])
@pytest.mark.parametrize("generation", ["none", Window((1, 4))])
def test_scopes_and_guards(prompt: Any, generation: Any) -> None:
    guard = Guard(max_effort=0.1 + 0.2, max_kl=None)
    sent = Program((Lqr(concept="tone", setpoint=1.0, apply=Scope(prompt, generation)).compile(BENCH),), guard)
    received = unpack(pack(sent))
    assert received.terms[0].scope == sent.terms[0].scope
    assert received.guard == guard


@pytest.mark.parametrize("on", ["prompt", "token"])
def test_conditions(on: Any) -> None:
    when = When(concept="tone", layer=1, above=0.1, on=on)
    sent = compile_program([Ablate(concept="tone", when=when)], BENCH)
    received = unpack(pack(sent))
    assert received.terms[0].gate is not None
    assert_same_term(sent.terms[0], received.terms[0])


def test_channels_with_scopes_of_their_own() -> None:
    term = Lqr(concept="tone", setpoint=1.0).compile(BENCH)
    sent = Program((replace(term, scopes=(Scope("all", Window((0, 2))),) * term.rank, is_whole=True),))
    assert_same_term(unpack(pack(sent)).terms[0], sent.terms[0])


def test_nothing_is_a_program_too() -> None:
    assert unpack(pack(Program())).fingerprint == Program().fingerprint


def test_what_is_not_a_whole_program_is_refused() -> None:
    good = pack(compile_program([Lqr(concept="tone", setpoint=1.0)], BENCH))
    header = int.from_bytes(good[:8], "little")
    wrong = [
        b"",
        b"\x00" * 8,
        good[:-1],
        good[: 8 + header],
        good[:8] + good[8:].replace(b"setpoint-program/1", b"setpoint-program/2", 1),
        good[:8] + good[8:].replace(b'"tone"', b'"note"', 1),
        good[:-1] + bytes([good[-1] ^ 1]),
        (2**63 - 1).to_bytes(8, "little") + good[8:],
    ]
    for data in wrong:
        with pytest.raises(ArtifactCorrupt):
            unpack(data)


def test_json_that_is_no_program_is_refused_too() -> None:
    """Whatever one value of it is replaced by: a program at most, never another error."""
    good = pack(compile_program([Lqr(concept="tone", setpoint=1.0)], BENCH))
    end = 8 + int.from_bytes(good[:8], "little")
    document = json.loads(good[8:end])

    def sent(header: str) -> bytes:
        return len(header).to_bytes(8, "little") + header.encode() + good[end:]

    def refused_or_taken(data: bytes) -> None:
        with suppress(ArtifactCorrupt):
            unpack(data)

    def each(value: Any) -> None:
        """Every place within a value, in turn something else, and then gone."""
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            before = value[key]
            for other in (None, 5, "x", [], {}, [1]):
                value[key] = other
                refused_or_taken(sent(json.dumps(document)))
            value[key] = before
            if isinstance(before, dict | list):
                each(before)
        for key in list(value) if isinstance(value, dict) else []:
            before = value.pop(key)
            refused_or_taken(sent(json.dumps(document)))
            value[key] = before

    document["terms"][0]["laws"] = document["terms"][0]["laws"][:2]
    with pytest.raises(ArtifactCorrupt):
        unpack(sent("[" * 100_000))
    each(document)


def test_numbers_keep_every_bit() -> None:
    term = Lqr(concept="tone", setpoint=1.0).compile(BENCH)
    law = next(iter(term.laws.values()))
    double = {route: replace(one, setpoint=one.setpoint.double() / 3) for route, one in term.laws.items()}  # type: ignore[type-var]
    sent = Program((replace(term, laws=double, target=1 / 3),))
    found = next(iter(unpack(pack(sent)).terms[0].laws.values()))
    assert found.setpoint.dtype == torch.float64 != law.setpoint.dtype
    assert torch.equal(found.setpoint, next(iter(double.values())).setpoint)
    assert unpack(pack(sent)).terms[0].target == 1 / 3
