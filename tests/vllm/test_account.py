"""What workers measured arrives whole, is counted once and up to the accepted token, and is never silently short."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from steering.condition import Gate, When
from steering.errors import SpecError, SteeringError
from steering.program import Positions, Program, Scope, Term, Window
from steering.runtime.launches import write_sites
from steering.types import across
from steering.vllm.account import Accounts, Answer, Parcel, Record
from steering.vllm.attachment import ASKED, KEY, Attachment, choice_name, first_steered, share_name
from steering.vllm.salt import check_compiled, salted
from tests.plans import noise
from tests.plants import WIDTH
from tests.runtime.naive import law

N_PROMPT = 4


def program(scope: Scope | None = None, on: str | None = None) -> Program:
    gate = None
    if on is not None:
        when = When(concept="c", layer=0, above=0.0, on=on)  # type: ignore[arg-type]
        gate = Gate(when, noise(WIDTH, seed=2).float(), 0.0, np.inf, 0.0, 1.0)
    return Program(
        (Term("t", "test", {across(1): law(1), across(2): law(2)}, scope or Scope("all", "all"), gate=gate),)
    )


def record(
    name: str, start: int, n: int, own: Program, *, effort: float = 0.25, answers: tuple[Answer, ...] = ()
) -> Record:
    R, routes = own.rank, tuple(own.laws)
    W = len(write_sites(routes))
    positions_K = np.arange(start, start + n)
    measured = np.tile(positions_K[:, None, None].astype(np.float32), (1, len(routes), R))
    total_K = np.full(n, 2 * effort, np.float32)
    active_KR = np.ones((n, R), bool)
    return Record(
        name, positions_K, active_KR, measured, np.full((W, n), effort, np.float32), total_K, np.zeros(n), answers
    )


def test_a_parcel_arrives_as_it_was_sent() -> None:
    own = program()
    answer = Answer(0, np.array([3]), np.array([0.5], np.float32))
    sent = Parcel((record("a", 0, 3, own), record("b", 5, 1, own, answers=(answer,))), {"a": 7}, {"c": "no"}, {"d": 2})
    got = Parcel.decode(sent.encode())
    assert (got.lost, got.failed, got.dropped) == (sent.lost, sent.failed, sent.dropped)
    for one, other in zip(sent.records, got.records, strict=True):
        for field in ("positions_K", "active_KR", "measured_KPR", "effort_WK", "total_K"):
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
        assert [a.term for a in one.answers] == [a.term for a in other.answers]
    assert Parcel.decode(b"") == Parcel()


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[:-1],
        lambda b: b + b"x",
        lambda b: b"\1\0\0\0{",
        lambda b: b.replace(b'"protocol": 1', b'"protocol": 9'),
    ],
)
def test_a_damaged_parcel_is_refused(damage: Any) -> None:
    data = Parcel((record("a", 0, 3, program()),)).encode()
    with pytest.raises(SteeringError, match="not arrive whole"):
        Parcel.decode(damage(data))


def test_what_was_run_too_far_is_not_counted() -> None:
    own, accounts = program(), Accounts()
    tally = accounts.open("a", own, N_PROMPT)
    accounts.file(Parcel((record("a", 0, N_PROMPT, own), record("a", 4, 1, own), record("a", 5, 1, own))).encode())
    assert accounts.settle("a", N_PROMPT).error is None
    assert tally.tokens == 4
    settled = accounts.settle("a", N_PROMPT + 1, trace=True)
    assert tally.tokens == 5
    assert [reading.layer for reading in settled.trace][:1] == [1]
    accounts.close("a")
    assert len(accounts) == 0


def test_one_record_may_span_the_last_accepted_token() -> None:
    own, accounts = program(), Accounts()
    tally = accounts.open("a", own, N_PROMPT)
    accounts.file(Parcel((record("a", 0, 7, own),)).encode())
    assert accounts.settle("a", 6).error is None
    assert tally.tokens == 6
    assert accounts.settle("a", 7).error is None
    assert tally.tokens == 7


@pytest.mark.parametrize("held", [(), (0, 1, 3), (1, 2, 3)])
def test_a_position_that_was_not_measured_is_an_error(held: tuple[int, ...]) -> None:
    own, accounts = program(), Accounts()
    accounts.open("a", own, N_PROMPT)
    accounts.file(Parcel(tuple(record("a", at, 1, own) for at in held)).encode())
    settled = accounts.settle("a", N_PROMPT)
    assert settled.error is not None
    assert f"{4 - len(held)} tokens" in settled.error


def test_lost_failed_and_dropped_end_a_request() -> None:
    own, accounts = program(), Accounts()
    for name in "abcd":
        accounts.open(name, own, N_PROMPT)
    bad = record("d", 0, N_PROMPT, own, effort=np.nan)
    whole = [record(name, 0, N_PROMPT, own) for name in "abc"]
    accounts.file(Parcel((*whole, bad), {"a": 5}, {"b": "no tap"}, {"c": 3}).encode())
    assert not accounts.settle("a", 4).is_lost  # from position 5 on, which nobody has accepted
    accounts.file(Parcel((record("a", 4, 1, own), record("a", 5, 1, own))).encode())
    assert accounts.settle("a", 6).is_lost
    assert accounts.settle("b", 4).error == "no tap"
    assert "3 tokens were dropped" in (accounts.settle("c", 4).error or "")
    assert accounts.settle("d", 4).is_lost


@pytest.mark.parametrize("projection", [1.0, -1.0])
def test_a_prompts_gate_decides_what_is_expected_behind_it(projection: float) -> None:
    own, accounts = program(Scope("last", "all"), on="prompt"), Accounts()
    tally = accounts.open("a", own, N_PROMPT)
    is_open = projection > 0
    answer = Answer(0, np.array([3]), np.array([projection], np.float32))
    accounts.file(Parcel((record("a", 3, 1, own, answers=(answer,)),)).encode())
    assert accounts.settle("a", 4).error is None
    assert tally.tokens == int(is_open)
    assert (accounts.settle("a", 5).error is not None) == is_open  # a step without a measurement


@pytest.mark.parametrize(
    ("scope", "first"),
    [
        (Scope("all", "all"), 0),
        (Scope("last", "none"), 3),
        (Scope("none", "all"), 4),
        (Scope(Positions((-2, 3)), "none"), 2),
        (Scope(Window((1, 3)), "all"), 1),
    ],
)
def test_the_first_steered_position_is_that_of_the_scopes(scope: Scope, first: int) -> None:
    assert first_steered(program(scope), N_PROMPT) == first


def test_an_attachment_comes_back_and_one_of_another_protocol_does_not() -> None:
    args = Attachment.of("r", program(), N_PROMPT, choices=2).to_args()
    with pytest.raises(SpecError, match="engine core with Setpoint's plugin"):
        Attachment.read(args)  # the core did not see it: its blocks would be everybody's
    check_compiled(SimpleNamespace(sampling_params=SimpleNamespace(extra_args={KEY: args})))
    back = Attachment.read(args)
    assert (back.name, back.first, back.choices) == ("r", 0, 2)
    assert back.program.fingerprint == args["fingerprint"]
    assert share_name("r", "1_r-abc", 2) == choice_name("r", 1)
    assert share_name("r", "r-abc", 1) == "r"
    with pytest.raises(SpecError, match="one version of Setpoint"):
        Attachment.read(args | {"protocol": 9})


def test_blocks_before_the_first_steered_position_are_everybodys() -> None:
    def plain(request: Any, start: int, end: int, mm: int) -> tuple[tuple[Any, ...] | None, int]:
        salt = (("cache_salt", request.cache_salt),) if start == 0 and request.cache_salt else None
        return salt, mm

    keys = salted(plain)

    def request(name: str, extra: dict[str, Any] | None, salt: str = "") -> Any:
        return SimpleNamespace(request_id=name, cache_salt=salt, sampling_params=SimpleNamespace(extra_args=extra))

    attached = Attachment.of("r", program(Scope(Positions((20,)), "all")), 40).to_args()
    steered, twin = request("a", {KEY: attached}), request("b", {KEY: attached})
    assert keys(steered, 0, 16, 0) == keys(request("c", None), 0, 16, 0) == (None, 0)
    assert keys(steered, 16, 32, 0)[0] == ((KEY, "a"),)
    assert keys(twin, 16, 32, 0)[0] == ((KEY, "b"),)  # the same program, another receipt
    assert keys(request("a", {KEY: attached | {"first": 0}}, "tenant"), 0, 16, 0)[0] == (
        ("cache_salt", "tenant"),
        (KEY, "a"),
    )


@pytest.mark.parametrize("extra", [{ASKED: "{}"}, {KEY: "x"}, {KEY: {"protocol": 1}}], ids=str)
def test_steering_that_was_not_compiled_does_not_pass_the_core(extra: dict[str, Any]) -> None:
    request = SimpleNamespace(sampling_params=SimpleNamespace(extra_args=extra))
    with pytest.raises(SpecError, match="compiled in the front"):
        check_compiled(request)
    check_compiled(SimpleNamespace(sampling_params=None))
