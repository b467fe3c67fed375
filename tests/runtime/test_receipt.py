"""The receipt is arithmetic on what was measured, and always JSON."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from steering.edit import Mask
from steering.program import Program, Scope, Term
from steering.runtime.launches import Reading, write_sites
from steering.runtime.receipt import Tally
from steering.runtime.scope import Steered
from steering.types import across, at, edit_at
from tests.runtime.naive import across_program, law

PROGRAM = across_program(1, layers=(0, 1, 2), scope=Scope("all"))
ROUTES = tuple(PROGRAM.laws)
MEASURED = np.arange(12, dtype=np.float32).reshape(4, 3, 1)
EFFORT = np.array([[0.1, 0, 0.3, 0.2], [0.1, 0, 0.1, 0.1], [0, 0, 0.2, 0.3]], dtype=np.float32)


def reading(measured: np.ndarray = MEASURED, effort: np.ndarray = EFFORT, routes: tuple = ROUTES) -> Reading:  # type: ignore[type-arg]
    saturated = np.array([0, 0, 1, 0], dtype=np.int32)
    return Reading(routes, write_sites(routes), measured, effort, saturated, effort.sum(0), effort.max(0))


def steered(*tokens: int, rank: int = 1) -> Steered:
    return Steered("a", np.array(tokens), np.ones((len(tokens), rank), dtype=bool))


def test_means_are_those_of_the_steered_tokens_in_the_callers_units() -> None:
    tally = Tally(PROGRAM)
    assert tally.add(steered(0), reading())
    assert tally.add(steered(2, 3), reading())
    receipt = tally.receipt()
    tracking = receipt.tracking["c"]
    by_layer = [(z - 0.5) / 2.0 for z in (5.0, 6.0, 7.0)]  # gauges of across_program: origin 0.5, scale 2
    assert tracking.layers == (0, 1, 2)
    assert tracking.by_layer == pytest.approx(by_layer)
    assert tracking.mean == pytest.approx(sum(by_layer[1:]) / 2), "the first layer's input could not be moved"
    assert tracking.error == pytest.approx(abs(1.0 - tracking.mean))
    assert receipt.tokens_steered == 3
    assert dict(receipt.effort) == pytest.approx(
        {"mean": 1.4 / 9, "max": 0.3, "saturated_tokens": 1, "sum_mean": 1.4 / 3, "sum_max": 0.6}
    )
    assert receipt.fingerprint == PROGRAM.fingerprint


def test_a_term_counts_only_the_tokens_at_which_it_acted() -> None:
    late = across_program(2, layers=(0, 1, 2), scope=Scope("none")).terms[0]
    both = Program((*PROGRAM.terms, replace(late, target=None)))
    tally = Tally(both)
    active = Steered("a", np.array([0, 1]), np.array([[True, False], [True, True]]))
    assert tally.add(active, reading(np.repeat(MEASURED, 2, axis=2)))
    first, second = tally.receipt().tracking["c"], tally.receipt().tracking["c#2"]
    assert first.by_layer[0] == pytest.approx(((0 + 3) / 2 - 0.5) / 2)
    assert second.by_layer[0] == pytest.approx((3 - 0.5) / 2)
    assert math.isnan(second.error)


def test_effort_that_is_not_finite_is_refused() -> None:
    for bad in (math.inf, math.nan):
        effort = EFFORT.copy()
        effort[1, 2] = bad
        tally = Tally(PROGRAM)
        assert not tally.add(steered(2), reading(effort=effort))
        assert tally.add(steered(3), reading(effort=effort))
        assert tally.tokens == 1


def test_json_has_null_where_nothing_was_measured() -> None:
    zero_scale = replace(PROGRAM.terms[0], gauges=dict.fromkeys(ROUTES, (0.0, 0.0)))
    ungauged = Term("u", "add", {at("final"): law(1)})
    for program in (PROGRAM, Program((zero_scale, ungauged))):
        tally = Tally(program)
        body = json.loads(json.dumps(tally.receipt().to_json(), allow_nan=False))
        assert body["tracking"]["c"]["mean"] is None
        assert body["tracking"]["c"]["by_layer"] == [None] * 3
        assert "u" not in body["tracking"]
        assert set(body) == {"fingerprint", "tokens_steered", "tracking", "effort"}


def test_a_trace_reads_one_token() -> None:
    tally = Tally(PROGRAM)
    tally.add(steered(2, 3), reading())
    readings = tally.trace(steered(2, 3), reading(), 3)
    assert [(r.label, r.layer, r.setpoint) for r in readings] == [("c", layer, 1.0) for layer in (0, 1, 2)]
    assert [r.projection for r in readings] == pytest.approx([(z - 0.5) / 2 for z in (9, 10, 11)])
    assert [r.effort for r in readings] == pytest.approx([0.2, 0.1, 0.3])
    assert tally.trace(steered(2, 3), reading(), 1) == ()


def test_a_trace_of_edits_has_the_effort_of_each_site() -> None:
    masks = {edit_at("mask", tap, 1): Mask.of(torch.zeros(4)) for tap in ("attn_in", "mlp_in")}
    program = Program((Term("m", "test", masks, gauges=dict.fromkeys(masks, (0.0, 1.0))),))
    found, effort = tuple(program.laws), np.array([[0.1], [0.4]], dtype=np.float32)
    tally = Tally(program)
    told = Reading(found, write_sites(found), np.zeros((1, 2, 1)), effort, np.zeros(1), effort.sum(0), np.array([0.4]))
    tally.add(steered(0), told)
    assert [r.effort for r in tally.trace(steered(0), told, 0)] == pytest.approx([0.1, 0.4])


def test_routes_of_another_order_are_found() -> None:
    tally = Tally(PROGRAM)
    tally.add(steered(0), reading())
    other = (across(7), *reversed(ROUTES))
    measured = np.concatenate([np.zeros((4, 1, 1), np.float32), MEASURED[:, ::-1]], axis=1)
    tally.add(steered(0), reading(measured, np.vstack([EFFORT[:1], EFFORT]), other))
    assert tally.receipt().tracking["c"].by_layer == pytest.approx([(z - 0.5) / 2 for z in (0, 1, 2)])
