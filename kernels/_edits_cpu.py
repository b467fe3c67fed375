"""The edits of one site for a CPU, compiled: `kernels.mask`, `kernels.turn`, `kernels.sparse` under `kernels._bound`.

Equations, promises and oracles are those of these four, whose references it must agree with. The count-th largest score
is found as on a GPU, by the bits of a float32 from the highest down, each bit one vectorised count over the row; it
ends where exactly `count` scores are left, which takes about a dozen of the 31 bits.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kernels._bound import MOST
from kernels._compile import jit
from kernels._memory import FIRST, beyond, copy, dot, integer, least, length, most, number, put, read, row, write
from kernels.feedback import TINY

assert jit is not None, "imported only where numba is"

SLOT, CHANNEL, STRENGTH, CAP, BUDGET, SPENT, MEASURED, EFFORT, SATURATED = map(np.int64, range(9))
"""Rows of the table that all edits have; those of the form follow in the order of its operator."""
SCALE, SHIFT, LOW, HIGH = map(np.int64, range(9, 13))
PLANE, ADAPTIVE, SETPOINT = map(np.int64, range(9, 12))
WEIGHT, THRESHOLD, COUNT, REST = map(np.int64, range(9, 13))
MASK, TURN, SPARSE = range(3)

LEAST, FAR = np.float32(TINY), np.float32(MOST)
NONE, HALF, ONE, TWO = np.float32(0), np.float32(0.5), np.float32(1), np.float32(2)
PI, ROUND = np.float32(math.pi), np.float32(2 * math.pi)
ENDLESS, NOTHING = np.float32(np.inf), np.float32(np.nan)
INFINITE = np.int32(0x7F800000)
"""The bits of the largest score that is a number."""


@jit
def _mask(table: Any, slot: Any, m: Any, y: Any, d: Any) -> Any:
    """The step of a mask into d; its z."""
    scale, shift = row(table, SCALE, slot, m, FIRST, y.size), row(table, SHIFT, slot, m, FIRST, y.size)
    low, high = row(table, LOW, slot, m, FIRST, y.size), row(table, HIGH, slot, m, FIRST, y.size)
    count = NONE
    for i in range(y.size):
        acts = (y[i] >= low[i]) & (y[i] <= high[i]) & ((scale[i] != ONE) | (shift[i] != NONE))
        d[i] = (scale[i] - ONE) * y[i] + shift[i] if acts else NONE
        count += ONE if acts else NONE
    return count / np.float32(y.size)


@jit
def _turn(table: Any, slot: Any, m: Any, y: Any, d: Any, strength: Any, angle: Any) -> Any:
    """The step of a turn into d; its z."""
    first, second = row(table, PLANE, slot, m, FIRST, y.size), row(table, PLANE, slot, m, FIRST + 1, y.size)
    one, two = dot(first, y), dot(second, y)
    phi = math.atan2(two, one)
    half = HALF * strength * (PI - (PI - (angle - phi)) % ROUND)
    sine, cosine = math.sin(half), math.cos(half)
    turns = number(table, ADAPTIVE, slot, m) == 0 or one > 0
    chord = TWO * sine if turns else NONE
    by_second, by_first = chord * (one * cosine - two * sine), chord * (one * sine + two * cosine)
    for i in range(y.size):
        d[i] = by_second * second[i] - by_first * first[i]
    return phi


@jit
def _at_least(score: Any, value: Any) -> Any:
    """How many scores are not below a value; NaN counts as the largest."""
    count = NONE  # in float32, exact here, since a counter of 64 bits would halve the lanes
    for i in range(score.size):
        count += NONE if score[i] < value else ONE
    return count


@jit
def _cut(score: Any, count: Any) -> Any:
    """A value that `count` scores reach, and no more but for ties; NaN where that many are NaN."""
    wanted = np.float32(min(np.int64(count), score.size))
    value = np.zeros(1, np.float32)
    bits = value.view(np.int32)
    if _at_least(score, ENDLESS) >= wanted:
        nans = NONE
        for i in range(score.size):
            nans += ONE if math.isnan(score[i]) else NONE
        return NOTHING if nans >= wanted else ENDLESS
    best = np.int32(0)
    for place in range(30, -1, -1):
        bits[0] = best | np.int32(1 << place)
        if bits[0] >= INFINITE:
            continue
        found = _at_least(score, value[0])
        if found >= wanted:
            best = bits[0]
        if found == wanted:
            break
    bits[0] = best
    return value[0]


@jit
def _sparse(table: Any, slot: Any, m: Any, y: Any, d: Any, score: Any, n_rest: Any) -> Any:
    """The step of a sparse edit into d; its z. `score` is scratch."""
    weight, count = row(table, WEIGHT, slot, m, FIRST, y.size), integer(table, COUNT, slot, m)
    for i in range(y.size):
        score[i] = abs(y[i] * weight[i])
    lost = NONE
    if count > 0:
        cut = _cut(score, count)
        for i in range(y.size):
            kept = score[i] >= cut
            d[i] = NONE if kept else -y[i]
            lost += NONE if kept else ONE
    else:
        cut = number(table, THRESHOLD, slot, m)
        for i in range(y.size):
            kept = score[i] > cut
            d[i] = NONE if kept else -y[i]
            lost += NONE if kept else ONE
    if n_rest:
        copy(d, score)
        for k in range(n_rest):
            rest = row(table, REST, slot, m, k, y.size)
            part = dot(score, rest)  # of −lost
            for i in range(y.size):
                d[i] -= part * rest[i]
    return lost / np.float32(y.size)


@jit
def _step(
    form: Any, table: Any, slot: Any, m: Any, y: Any, strength: Any, angle: Any, d: Any, score: Any, n_rest: Any
) -> Any:
    """Equation (1): the step of an edit into d; its z and its factor."""
    if form == MASK:
        return _mask(table, slot, m, y, d), strength
    if form == TURN:
        return _turn(table, slot, m, y, d, strength, angle), ONE
    return _sparse(table, slot, m, y, d, score, n_rest), strength


@jit
def _bounded(step: Any, size: Any, factor: Any, bound: Any) -> Any:
    """Equation (3) from ‖d‖, ‖y‖, f and b: the f that is allowed, its ρ, and whether the bound bit."""
    moved, allowed = abs(factor) * step, bound * size
    over = moved > allowed and step < ENDLESS
    rho = ENDLESS if moved > FAR else moved / size
    if over:
        rho, factor = bound, math.copysign(allowed / step, factor)
    return factor, rho if size < ENDLESS else NOTHING, over


@jit
def _astray(table: Any, n_tokens: Any, n_edits: Any, n_channels: Any) -> Any:
    """Whether an edit of a token follows a channel that the knobs do not have. Slots are those of the bank."""
    for t in range(n_tokens):
        slot = integer(table, SLOT, t, FIRST)
        for m in range(n_edits):
            if slot != 0 and integer(table, CHANNEL, slot, m) >= n_channels:
                return True
    return False


@jit
def edit(
    form: Any, table: Any, n_slots: Any, n_edits: Any, n_rest: Any, n_channels: Any, n_tokens: Any,
    y_at: Any, y_stride: Any, y_kind: Any, width: Any,
) -> Any:  # fmt: skip
    """All edits of all tokens; y's address and stride in bytes. False, and nothing done, where the bank lacks a slot or
    the knobs lack a channel."""
    if beyond(table, SLOT, n_tokens, n_slots) or _astray(table, n_tokens, n_edits, n_channels):
        return False
    scratch, before = np.empty(width, np.float32), np.empty(width, np.float32)
    d, score = np.empty(width, np.float32), np.empty(width, np.float32)
    for t in range(n_tokens):
        slot = integer(table, SLOT, t, FIRST)
        if slot == 0:
            continue
        y = read(y_at + t * y_stride, y_kind, scratch)
        if y_kind != 0:
            copy(y, before)
        budget, spent = number(table, BUDGET, t, FIRST), number(table, SPENT, t, FIRST)
        effort, acts = number(table, EFFORT, t, FIRST), False
        for m in range(n_edits):
            channel = integer(table, CHANNEL, slot, m)
            if channel < 0:
                continue
            strength = number(table, STRENGTH, t, channel)
            angle = number(table, SETPOINT, t, channel) if form == TURN else NONE
            z, factor = _step(form, table, slot, m, y, strength, angle, d, score, n_rest)
            put(table, MEASURED, t, channel, z)
            if strength == 0:
                continue
            acts = True
            bound = least(number(table, CAP, t, channel), most(budget - spent, NONE))
            factor, rho, over = _bounded(length(d), most(length(y), LEAST), factor, bound)
            if over:
                put(table, SATURATED, t, FIRST, np.int32(1))
            for i in range(width):
                u = d[i] * factor
                y[i] = y[i] + u if u != 0 else y[i]  # selected, not added: −0 + 0 is 0
            spent += rho
            effort += rho
        if acts:
            write(y_at + t * y_stride, y_kind, y, before)
            put(table, SPENT, t, FIRST, spent)
            put(table, EFFORT, t, FIRST, effort)
    return True
