"""The one law that every intervention compiles to.

    y ← y + Σ_j a_j · sat(r_j − z_j) g_j,          z_j = c_j·x,  or floor_j where c_j·x ≤ knee_j       (1)

x is read at one site, y written at another. Channel j measures z_j (the probe; with a knee, a rectified one, such as a
sparse autoencoder's feature), compares it with the setpoint r_j (r_j ‖x‖ where it is relative to the running norm),
saturates the error at ±limit_j and spends a_j of it along the gain g_j. Two bounds on the relative effort ‖u‖/‖x‖
follow: `cap_j` per channel, |a_j e_j|·‖g_j‖ ≤ cap_j ‖x‖, and the request's budget over the layers
(`steering.program.Guard`).

What is not such a law is an edit (`steering.edit`). What the law covers exactly: addition (c = 0, r = 1, g = the
vector), ablation (c = g = v, r = 0), clamp (c = g = v, r = β), A-LQR (c = v, r = β, g = K v; arXiv 2604.19018, Sec. 4),
the P, I and D terms of S-PID (the I and D terms read earlier layers), LEACE, LoReFT and EigenShift at the final norm.

Superposition concatenates channels. It is free of order because all channels read the same x.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor

from steering.errors import DimensionMismatch, SpecError
from steering.types import Form

TINY = torch.finfo(torch.float32).tiny
"""Floor of ‖x‖ under a cap, so that a zero row has a finite effort."""


@dataclass(frozen=True, slots=True, eq=False)
class Law:
    """Saturated output feedback of rank R, float64 or float32, on the CPU until it is made resident.

    probe (R, D), setpoint (R,), gain (R, E), and per channel: limit ≥ 0 (+inf: none), strength a, cap ≥ 0 (+inf: none),
    knee and floor (−inf: none), relative 0 or 1. `Law.of` fills in all but the first three. Raises DimensionMismatch
    when the shapes disagree or there is no channel, SpecError on NaN, on a probe or gain that is not finite and on a
    limit or cap below 0.
    """

    probe: Tensor
    setpoint: Tensor
    gain: Tensor
    limit: Tensor
    strength: Tensor
    cap: Tensor
    knee: Tensor
    floor: Tensor
    relative: Tensor

    form: ClassVar[Form] = "law"

    def __post_init__(self) -> None:
        if self.probe.ndim != 2 or self.gain.ndim != 2 or not len(self.probe):
            raise DimensionMismatch(
                "Expected a probe (R, D) and a gain (R, E) with R ≥ 1, "
                f"got shapes {tuple(self.probe.shape)} and {tuple(self.gain.shape)}."
            )
        for field in fields(self):
            tensor = getattr(self, field.name)
            matrix = field.name in ("probe", "gain")
            if tensor.shape[:1] != (self.rank,) or tensor.ndim != 1 + matrix:
                raise DimensionMismatch(
                    f"{field.name}: expected one row for each of the probe's {self.rank} channels, "
                    f"got shape {tuple(tensor.shape)}."
                )
            if torch.isnan(tensor).any():
                raise SpecError(field.name, expected="numbers without NaN")
            if matrix and torch.isinf(tensor).any():
                raise SpecError(field.name, expected="finite numbers")
            if field.name in ("limit", "cap") and (tensor < 0).any():
                raise SpecError(field.name, expected="numbers >= 0")
        if not torch.isfinite(self.floor[self.knee > -math.inf]).all():
            raise SpecError("floor", expected="a finite number wherever there is a knee")

    @classmethod
    def of(
        cls,
        probe: Tensor,
        setpoint: Tensor | float,
        gain: Tensor,
        *,
        limit: float = math.inf,
        strength: float = 1.0,
        cap: float = math.inf,
        knee: Tensor | float = -math.inf,
        floor: Tensor | float = -math.inf,
        relative: bool = False,
    ) -> Law:
        """A law from its three essential parts.

        A vector is taken as one channel, a scalar is repeated over channels.
        """
        probe, gain = torch.atleast_2d(probe), torch.atleast_2d(gain)

        def row(value: Tensor | float) -> Tensor:
            filled = torch.as_tensor(value, dtype=probe.dtype)
            return filled.expand(probe.shape[0]).clone() if filled.ndim == 0 else filled

        rest = (limit, strength, cap, knee, floor, float(relative))
        return cls(probe, row(setpoint), gain, *(row(value) for value in rest))

    @classmethod
    def addition(cls, vector: Tensor) -> Law:
        """y + vector: a law without a probe (c = 0, r = 1). vector (E,). The probe has the vector's own width."""
        return cls.of(torch.zeros_like(vector), 1.0, vector)

    @classmethod
    def projector(cls, direction: Tensor) -> Law:
        """y − v (v·x), v = direction/‖direction‖: removes a direction. direction (D,). Idempotent where x is y."""
        unit = direction / direction.norm()
        return cls.of(unit, 0.0, unit)

    @classmethod
    def idle(cls, rank: int, read_width: int, write_width: int, dtype: torch.dtype = torch.float32) -> Law:
        """The zero element of rank R: measures nothing, does nothing."""
        return cls.of(
            torch.zeros(rank, read_width, dtype=dtype), 0.0, torch.zeros(rank, write_width, dtype=dtype), strength=0.0
        )

    @property
    def rank(self) -> int:
        """R."""
        return self.probe.shape[0]

    @property
    def widths(self) -> tuple[int, int]:
        """(D, E)."""
        return self.probe.shape[1], self.gain.shape[1]

    def __call__(self, y_TE: Tensor, x_TD: Tensor) -> Tensor:
        """Equation (1) with caps and without a budget; returns a new y. The kernel must agree."""
        probe, gain = self.probe.to(x_TD.dtype), self.gain.to(y_TE.dtype)
        norm_R = gain.norm(dim=-1)
        size_T1 = x_TD.norm(dim=-1, keepdim=True).clamp_min(TINY)
        z_TR = x_TD @ probe.mT
        z_TR = torch.where(z_TR <= self.knee, self.floor.to(z_TR.dtype), z_TR)
        target_TR = self.setpoint.to(x_TD.dtype) * size_T1.where(self.relative != 0, 1.0)
        error_TR = (target_TR - z_TR).clamp(-self.limit, self.limit)
        # Selected, not multiplied: an infinite error that nobody spends is 0, not NaN.
        spend_TR = (error_TR * self.strength).where((self.strength != 0) & (norm_R > 0), 0.0)
        bound_TR = (self.cap * size_T1 / norm_R).where(norm_R > 0, math.inf)
        return y_TE + spend_TR.clamp(-bound_TR, bound_TR).to(y_TE.dtype) @ gain

    def __add__(self, other: Law) -> Law:
        """Superposition: (a + b)(x) = a(x) + b(x) − x, for laws that read the same x."""
        if self.widths != other.widths:
            raise DimensionMismatch(f"laws of widths {self.widths} and {other.widths} cannot act on one route")
        return Law(*(torch.cat([getattr(self, f.name), getattr(other, f.name)]) for f in fields(Law)))

    def __rmul__(self, factor: float) -> Law:
        """Scales how much of the control is applied, never where the setpoint is."""
        return replace(self, strength=factor * self.strength)

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Law:
        """The same law in another precision, on another device."""
        return Law(*(getattr(self, f.name).to(device, dtype) for f in fields(Law)))

    def padded(self, rank: int) -> Law:
        """The same law with idle channels appended up to `rank`."""
        missing = rank - self.rank
        return self if missing == 0 else self + Law.idle(missing, *self.widths, dtype=self.probe.dtype)

    @property
    def is_idle(self) -> bool:
        """Whether it can only measure: no channel has a gain."""
        return not bool(self.gain.any())

    def resident(self) -> dict[str, Tensor]:
        """What a slot of the bank holds, in float32: shared by all requests that differ in their knobs alone.

        Knobs are setpoint, strength and cap. Channels behind the last that measures or acts are left out, so that a
        route costs what its own laws need, however wide other routes are.
        """
        used = torch.nonzero(self.probe.any(dim=-1) | self.gain.any(dim=-1)).flatten()
        last = int(used[-1]) + 1 if len(used) else 1
        names = ("probe", "gain", "limit", "knee", "floor", "relative")
        found = {name: getattr(self, name)[:last].to(torch.float32) for name in names}
        return found | {"norm": found["gain"].norm(dim=-1)}

    def knobs(self, rank: int) -> Tensor:
        """Setpoint, strength and cap of `rank` channels (3, rank), float32."""
        padded = self.padded(rank)
        return torch.stack([getattr(padded, name).to(torch.float32) for name in ("setpoint", "strength", "cap")])

    @staticmethod
    def join(parts: Sequence[tuple[Law | None, int]]) -> Law:
        """Superposition of several interventions' laws on one route, each with as many channels as it owns anywhere.

        `parts`: law and channels; None where the intervention does not use the route. At least one law.
        """
        read, write = next(law.widths for law, _ in parts if law is not None)
        owned = [Law.idle(rank, read, write) if law is None else law.padded(rank) for law, rank in parts if rank]
        return reduce(Law.__add__, owned)
