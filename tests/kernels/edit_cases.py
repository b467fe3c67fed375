"""Batches for the edits of a site and the naive float64 loop that they must equal."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.kernels.cases import INF, MUTATED, Batch

FORMS = ("mask", "turn", "sparsify")
SLOTS, CHANNELS = 5, 4


def batch(
    form: str,
    T: int,
    E: int,
    M: int = 3,
    *,
    K: int = 2,
    dtype: torch.dtype = torch.float32,
    slots: str = "mixed",
    bounds: bool = True,
    seed: int = 0,
) -> Batch:
    """A random batch of one form, its arguments in order; rows of y have gaps, knobs are views of larger tensors.

    slots: "mixed" (0 among them) · "all" · "one". Slot 0 and every padded edit hold NaN, which must do no harm.
    Programs 1 and 3 have all edits, the others some; no two edits of a program share a channel (M ≤ 4).
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(seed * 7919 + T * 131 + E * 17 + M)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=wide)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=wide)

    def knob(values: Tensor) -> Tensor:
        return values.unsqueeze(1).repeat(1, 3, 1)[:, 1]

    channel_SM = torch.stack([torch.randperm(CHANNELS, generator=generator)[:M] for _ in range(SLOTS)]).int()
    channel_SM[torch.rand(SLOTS, M, generator=generator) < 0.4] = -1
    channel_SM[1::2] = torch.stack([torch.randperm(CHANNELS, generator=generator)[:M] for _ in range(2)]).int()
    channel_SM[0] = -1
    bank = {
        "mask": lambda: {
            "scale_SME": torch.where(uniform(SLOTS, M, E) < 0.3, 1.0, normal(SLOTS, M, E)),
            "shift_SME": torch.where(uniform(SLOTS, M, E) < 0.5, 0.0, normal(SLOTS, M, E)),
            "low_SME": torch.where(uniform(SLOTS, M, E) < 0.5, -INF, normal(SLOTS, M, E) - 1),
            "high_SME": torch.where(uniform(SLOTS, M, E) < 0.5, INF, normal(SLOTS, M, E) + 1),
        },
        "turn": lambda: {
            "plane_SM2E": torch.linalg.qr(normal(SLOTS, M, E, 2).double()).Q.mT.to(wide).contiguous(),
            "adaptive_SM": (uniform(SLOTS, M) < 0.4).to(wide),
        },
        "sparsify": lambda: {
            "weight_SME": uniform(SLOTS, M, E),
            "threshold_SM": 0.3 * uniform(SLOTS, M),
            "count_SM": torch.where(
                uniform(SLOTS, M) < 0.3, 0, torch.randint(1, E + 2, (SLOTS, M), generator=generator)
            ).int(),
            "rest_SMKE": torch.linalg.qr(normal(SLOTS, M, E, K).double()).Q.mT.to(wide).contiguous(),
        },
    }[form]()
    for tensor in bank.values():
        if tensor.is_floating_point():
            tensor[channel_SM < 0] = torch.nan
    slot_T = {
        "mixed": torch.randint(0, SLOTS, (T,), generator=generator),
        "all": torch.randint(1, SLOTS, (T,), generator=generator),
        "one": torch.full((T,), 3),
    }[slots].int()
    strength_TR = torch.where(uniform(T, CHANNELS) < 0.5, 1.0, normal(T, CHANNELS))
    strength_TR[torch.rand(T, CHANNELS, generator=generator) < 0.2] = 0

    def some(*shape: int, scale: float) -> Tensor:
        return (
            torch.where(uniform(*shape) < 0.5, uniform(*shape) * scale, INF)
            if bounds
            else torch.full(shape, INF, dtype=wide)
        )

    setpoint = {"setpoint_TR": knob(2 * normal(T, CHANNELS))} if form == "turn" else {}
    return {
        "y_TE": normal(T, E + 3).to(dtype)[:, :E],
        "slot_T": slot_T,
        **bank,
        "channel_SM": channel_SM,
        **setpoint,
        "strength_TR": knob(strength_TR),
        "cap_TR": knob(some(T, CHANNELS, scale=0.5)),
        "budget_T": some(T, scale=1.0),
        "spent_T": torch.full((T,), 0.05, dtype=wide),
        "measured_TR": knob(torch.zeros(T, CHANNELS, dtype=wide)),
        "effort_T": torch.zeros(T, dtype=wide),
        "saturated_T": torch.zeros(T, dtype=torch.int32),
    }


def wanted(form: str, args: Batch, slot: int, m: int, y: Tensor, a: float, theta: float) -> tuple[Tensor, float, float]:
    """What edit m makes of one row at strength a, in float64, what it measures, and how ill-conditioned that is."""
    own = {name: value[slot, m].double() for name, value in args.items() if "SM" in name and name != "channel_SM"}
    if form == "mask":
        new, count = y.clone(), 0
        for i in range(len(y)):
            low, high, s, b = (own[name][i].item() for name in ("low_SME", "high_SME", "scale_SME", "shift_SME"))
            if low <= y[i] <= high and (s, b) != (1.0, 0.0):
                new[i], count = s * y[i] + b, count + 1
        return y + a * (new - y), count / len(y), 1.0
    if form == "turn":
        one, two = own["plane_SM2E"]
        c = complex(one @ y, two @ y)
        phi = math.atan2(c.imag, c.real)
        slack = math.pi + y.norm().item() / abs(c)
        if own["adaptive_SM"] and c.real <= 0:
            return y, phi, slack
        error = math.remainder(theta - phi, 2 * math.pi)
        aim = phi + a * error
        flat = y - c.real * one - c.imag * two
        return flat + abs(c) * (math.cos(aim) * one + math.sin(aim) * two), phi, slack
    score = y.abs() * own["weight_SME"]
    count = int(own["count_SM"])
    least = sorted(score.tolist(), reverse=True)[min(count, len(y)) - 1]
    kept = score >= least if count else score > own["threshold_SM"]
    lost = torch.where(kept, 0.0, y)
    new = y - lost + own["rest_SMKE"].mT @ (own["rest_SMKE"] @ lost)
    return y + a * (new - y), 1 - kept.double().mean().item(), 1.0


def oracle(form: str, args: Batch) -> tuple[Batch, Tensor, Tensor]:
    """The edits token by token in float64; beside them, for tolerances, the largest numbers met on the way (T,) and
    the conditions of what is measured (T, R)."""
    out = {name: value.double() if value.is_floating_point() else value.clone() for name, value in args.items()}
    scale_T, slack_TR = torch.zeros(len(args["y_TE"])).double(), torch.zeros(out["measured_TR"].shape).double()
    for t, slot in enumerate(args["slot_T"].tolist()):
        for m, j in enumerate(args["channel_SM"][slot].tolist() if slot else []):
            if j < 0:
                continue
            y, a = out["y_TE"][t].clone(), args["strength_TR"][t, j].item()
            theta = args["setpoint_TR"][t, j].item() if form == "turn" else 0.0
            new, out["measured_TR"][t, j], slack_TR[t, j] = wanted(form, args, slot, m, y, a, theta)
            scale_T[t] = torch.maximum(scale_T[t] + (new - y).norm() * (1 + abs(a)), y.norm())
            slack_TR[t, j] *= 1 + scale_T[t] / y.norm()
            if a == 0:
                continue
            u = new - y
            rho = (u.norm() / y.norm()).item()
            left = max(args["budget_T"][t].item() - out["spent_T"][t].item(), 0.0)
            bound = min(args["cap_TR"][t, j].item(), left)
            if rho > bound:
                u, rho, out["saturated_T"][t] = u * (bound / rho), bound, 1
            out["y_TE"][t] = y + u
            out["spent_T"][t] += rho
            out["effort_T"][t] += rho
    return out, scale_T, slack_TR


def assert_agrees(form: str, args: Batch, got: Batch, rounding: float, unit: float) -> None:
    """Equality with the oracle. `unit` bounds the error of the working precision relative to the largest numbers that
    are met, `rounding` the one of storing y, relative to the element."""
    want, scale_T, slack_TR = oracle(form, args)
    error = {name: (got[name].double() - want[name].double()).abs() for name in MUTATED}
    around = torch.minimum(error["measured_TR"], (2 * math.pi - error["measured_TR"]).abs())
    assert ((around if form == "turn" else error["measured_TR"]) <= unit * slack_TR).all()
    relative_T = 1 + scale_T / args["y_TE"].double().norm(dim=-1)
    assert (error["effort_T"] <= unit * relative_T).all()
    assert (error["spent_T"] <= unit * relative_T).all()
    assert (error["y_TE"] <= rounding * want["y_TE"].abs() + unit * scale_T[:, None]).all()
    assert torch.equal(got["saturated_T"], want["saturated_T"])
