"""Batches for the operator and the naive float64 loop that it must equal."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

INF = math.inf
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

both_ways = pytest.mark.usefixtures("way")
"""Runs a test with the compiled function and with the reference: see conftest.py."""

Batch = dict[str, Tensor]
"""The arguments of `feedback_` by name, in its order."""

PER_TOKEN = [
    "y_TE",
    "x_TD",
    "slot_T",
    "setpoint_TR",
    "strength_TR",
    "cap_TR",
    "budget_T",
    "spent_T",
    "measured_TR",
    "effort_T",
    "saturated_T",
]
MUTATED = ("y_TE", "spent_T", "measured_TR", "effort_T", "saturated_T")


def batch(
    T: int,
    D: int,
    R: int,
    *,
    E: int | None = None,
    dtype: torch.dtype = torch.float32,
    slots: str = "mixed",
    bounds: bool = True,
    knees: bool = False,
    seed: int = 0,
) -> Batch:
    """A random batch; every row stride is larger than the row, and knobs are views of (T, routes, R) tensors.

    slots: "mixed" (0 among them) · "all" · "one". bounds: limits, caps and budgets, some of them finite. knees: some
    channels have a knee, some a setpoint in ‖x‖; without, `feedback_` takes its shorter way.
    """
    E, S = E or D, 6
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(seed * 7919 + T * 131 + D * 17 + R)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=wide)

    def rows(width: int) -> Tensor:
        return normal(T, width + 3).to(dtype)[:, :width]

    def knob(values: Tensor) -> Tensor:
        return values.unsqueeze(1).repeat(1, 3, 1)[:, 1]

    def some(*shape: int, scale: float) -> Tensor:
        drawn = torch.rand(*shape, generator=generator, dtype=wide)
        return torch.where(drawn < 0.5, drawn * scale + 1e-3, INF) if bounds else torch.full(shape, INF, dtype=wide)

    slot_T = {
        "mixed": torch.randint(0, S, (T,), generator=generator),
        "all": torch.randint(1, S, (T,), generator=generator),
        "one": torch.full((T,), 3),
    }[slots].int()
    drawn = torch.rand(3, S, R, generator=generator, dtype=wide)
    has_knee = knees & (drawn[0] < 0.5)
    gain_SRE = normal(S, R, E) / E**0.5
    gain_SRE[0] = 0
    strength_TR = normal(T, R)
    strength_TR[torch.rand(T, R, generator=generator) < 0.2] = 0
    return {
        "y_TE": rows(E),
        "x_TD": rows(D),
        "slot_T": slot_T,
        "probe_SRD": normal(S, R, D) / D**0.5,
        "gain_SRE": gain_SRE,
        "norm_SR": gain_SRE.norm(dim=-1),
        "limit_SR": some(S, R, scale=4.0),
        "knee_SR": (drawn[1] - 0.5).where(has_knee, -INF),
        "floor_SR": (drawn[1] - 1.0).where(has_knee, -INF),
        "relative_SR": (knees & (drawn[2] < 0.5)).to(wide),
        "setpoint_TR": knob(3 * normal(T, R)),
        "strength_TR": knob(strength_TR),
        "cap_TR": knob(some(T, R, scale=0.5)),
        "budget_T": some(T, scale=1.0),
        "spent_T": torch.full((T,), 0.05, dtype=wide),
        "measured_TR": knob(torch.zeros(T, R, dtype=wide)),
        "effort_T": torch.zeros(T, dtype=wide),
        "saturated_T": torch.zeros(T, dtype=torch.int32),
    }


def clone(args: Batch) -> Batch:
    """A deep copy that keeps the strides."""
    return {
        name: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(value)
        for name, value in args.items()
    }


def tokens(args: Batch, start: int, stop: int) -> Batch:
    """The batch of some of its tokens, as copies."""
    return {name: (value[start:stop] if name in PER_TOKEN else value).clone() for name, value in args.items()}


def same_bits(one: Tensor, two: Tensor) -> bool:
    """Equality of the bytes: NaN equals itself, −0 differs from 0."""
    as_bytes = (value.contiguous().reshape(-1).view(torch.uint8) for value in (one, two))
    return one.dtype == two.dtype and torch.equal(*as_bytes)


def assert_same(one: Batch, two: Batch) -> None:
    for name in MUTATED:
        assert same_bits(one[name], two[name]), name


def oracle(args: Batch) -> Batch:
    """The law token by token and channel by channel in float64, in the order in which it is stated."""
    out = {name: value.double() if value.is_floating_point() else value.clone() for name, value in args.items()}
    for t, slot in enumerate(args["slot_T"].tolist()):
        if slot == 0:
            continue
        x = args["x_TD"][t].double()
        size = max(x.norm().item(), torch.finfo(torch.float32).tiny)
        avail = max(args["budget_T"][t].item() - args["spent_T"][t].item(), 0.0)
        u, hit, acts = torch.zeros_like(out["y_TE"][t]), False, False
        for j in range(args["norm_SR"].shape[1]):
            z = (args["probe_SRD"][slot, j].double() @ x).item()
            if z <= args["knee_SR"][slot, j]:
                z = args["floor_SR"][slot, j].item()
            out["measured_TR"][t, j] = z
            a, limit = args["strength_TR"][t, j].item(), args["limit_SR"][slot, j].item()
            if a == 0:
                continue
            acts = True
            aim = args["setpoint_TR"][t, j].item() * (size if args["relative_SR"][slot, j] else 1.0)
            error = aim - z
            spend = a * min(max(error, -limit), limit)
            hit |= abs(error) > limit
            g = args["gain_SRE"][slot, j].double()
            allowed = min(args["cap_TR"][t, j].item(), avail) * size
            if abs(spend) * g.norm().item() > allowed:
                spend, hit = math.copysign(allowed / g.norm().item(), spend), True
            u += spend * g
        rho = u.norm().item() / size
        if rho > avail:
            u, rho, hit = u * (avail / rho), avail, True
        if acts:
            out["y_TE"][t] += u
            out["spent_T"][t] += rho
            out["effort_T"][t] += rho
            out["saturated_T"][t] |= hit
    return out


def assert_agrees(args: Batch, got: Batch, rounding: float, unit: float) -> None:
    """Equality with the oracle. `unit` bounds the error of the working precision relative to the largest term of a sum,
    `rounding` the one of storing y, relative to the element."""
    want = oracle(args)
    slot = args["slot_T"].long()
    x_T = args["x_TD"].double().norm(dim=-1)
    z_TR = x_T[:, None] * args["probe_SRD"].double().norm(dim=-1)[slot]
    aim_TR = args["setpoint_TR"].abs() * x_T[:, None].where(args["relative_SR"][slot] != 0, 1.0)
    floor_TR = args["floor_SR"][slot].abs().nan_to_num(posinf=0.0)
    u_T = (args["strength_TR"].abs() * (aim_TR + z_TR + floor_TR) * args["norm_SR"][slot]).double().sum(1)
    error = {name: (got[name].double() - want[name].double()).abs() for name in MUTATED}
    assert (error["measured_TR"] <= unit * z_TR).all()
    assert (error["effort_T"] <= unit * (1 + u_T / x_T)).all()
    assert (error["spent_T"] <= unit * (1 + u_T / x_T)).all()
    terms_T1 = (u_T + args["y_TE"].double().abs().amax(-1))[:, None]
    assert (error["y_TE"] <= rounding * want["y_TE"].abs() + unit * terms_T1).all()
    assert torch.equal(got["saturated_T"], want["saturated_T"])
