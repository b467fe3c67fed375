"""The law of `kernels.feedback` for a CPU, compiled: one pass over the tokens, each row read and written once.

Equations, promises and oracle are those of `kernels.feedback`, whose `reference` it must agree with; a channel that is
idle is skipped rather than multiplied by 0. Cost: (2R + 2) rows read and one written a token.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels._compile import jit
from kernels._memory import FIRST, add, beyond, dot, integer, least, length, most, number, put, read, row
from kernels.feedback import TINY

assert jit is not None, "imported only where numba is"

(
    SLOT, PROBE, GAIN, NORM, LIMIT, KNEE, FLOOR, RELATIVE, SETPOINT, STRENGTH, CAP, BUDGET, SPENT, MEASURED, EFFORT,
    SATURATED,
) = map(np.int64, range(16))  # fmt: skip
"""Rows of the table: the arguments of `feedback_` after y and x."""

LEAST = np.float32(TINY)
NONE = np.float32(0)


@jit
def _spent(table: Any, slot: Any, t: Any, j: Any, z: Any, size: Any, avail: Any) -> Any:
    """Equations (2) and (3): what channel j wants to spend and what it may, 0 and 0 where it is idle."""
    strength, norm = number(table, STRENGTH, t, j), number(table, NORM, slot, j)
    if strength == 0 or norm == 0:
        return NONE, NONE
    aim = number(table, SETPOINT, t, j)
    if number(table, RELATIVE, slot, j) != 0:
        aim *= size
    wanted = (aim - z) * strength
    # Both bounds as one: rounding is monotone, so ±|a|·limit clips a·e where ±limit clips e.
    bound = least(least(number(table, CAP, t, j), avail) * size / norm, abs(strength) * number(table, LIMIT, slot, j))
    return wanted, least(most(wanted, -bound), bound)


@jit
def _step(table: Any, slot: Any, spend_R: Any, avail: Any, size: Any, step: Any) -> Any:
    """Equation (4): u into `step`; its ρ, and whether the budget shortened it."""
    for i in range(step.size):
        step[i] = NONE
    for j in range(spend_R.size):
        if spend_R[j] != 0:
            spend, gain = spend_R[j], row(table, GAIN, slot, j, FIRST, step.size)
            for i in range(step.size):
                step[i] += spend * gain[i]
    rho = length(step) / size
    if not rho > avail:
        return rho, False
    share = avail / rho
    for i in range(step.size):
        step[i] *= share
    return avail, True


@jit
def feedback(
    table: Any, n_slots: Any, n_channels: Any, n_tokens: Any,
    y_at: Any, y_stride: Any, y_kind: Any, n_out: Any,
    x_at: Any, x_stride: Any, x_kind: Any, n_in: Any,
) -> Any:  # fmt: skip
    """Equations (1) to (5); addresses and strides in bytes. False, and nothing done, where the bank lacks a slot."""
    if beyond(table, SLOT, n_tokens, n_slots):
        return False
    scratch, step, spend_R = np.empty(n_in, np.float32), np.empty(n_out, np.float32), np.empty(n_channels, np.float32)
    for t in range(n_tokens):
        slot = integer(table, SLOT, t, FIRST)
        if slot == 0:
            continue
        x = read(x_at + t * x_stride, x_kind, scratch)
        size, spent = most(length(x), LEAST), number(table, SPENT, t, FIRST)
        avail = most(number(table, BUDGET, t, FIRST) - spent, NONE)
        acts, bites = False, False
        for j in range(n_channels):
            z = dot(x, row(table, PROBE, slot, j, FIRST, n_in))
            if z <= number(table, KNEE, slot, j):
                z = number(table, FLOOR, slot, j)
            put(table, MEASURED, t, j, z)
            wanted, spend_R[j] = _spent(table, slot, t, j, z, size, avail)
            acts |= number(table, STRENGTH, t, j) != 0 and number(table, NORM, slot, j) != 0
            bites |= spend_R[j] != wanted
        if not acts:
            continue
        rho, is_short = _step(table, slot, spend_R, avail, size, step)
        add(y_at + t * y_stride, y_kind, step)
        put(table, SPENT, t, FIRST, spent + rho)
        put(table, EFFORT, t, FIRST, number(table, EFFORT, t, FIRST) + rho)
        if bites or is_short:
            put(table, SATURATED, t, FIRST, np.int32(1))
    return True
