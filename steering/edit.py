"""The second form and the third: edits of one site that no law of `steering.law` expresses.

    y ← y + a·u,   u = F(y) − y,   ‖a·u‖ ≤ cap ‖y‖                                                    (1)

    Mask     F(y)_i = s_i y_i + b_i  where low_i ≤ y_i ≤ high_i,  else y_i                             (2)
    Turn     F(y) = y − Py + ‖Py‖ (cos φ' b_1 + sin φ' b_2),  φ' = φ + a·wrap(θ − φ)                   (3)
    Sparse   F(y) = k ⊙ y + Rᵀ R ((1 − k) ⊙ y),   k_i = 1 where |y_i| w_i is large enough              (4)

with φ the angle of y in the plane P of (b_1, b_2) and wrap to (−π, π]. A mask drops, damps or replaces neurons and
heads, leaves out whole layers (s = b = 0), and transports coordinates inside their support (Linear-AcT,
arXiv:2410.23054). A turn is angular steering (arXiv:2510.26243): for every strength a the norm stays. Sparse is TEAL's
threshold, WINA's score, a top-k and R-Sparse's low-rank rest in one.

Edits of one route act one after another, in the order of the request's interventions; each owns one channel, whose
knobs are the request's. At one site masks act first, then turns, then laws, then sparsity: what a law holds is what the
model goes on with, and what is made sparse stays so.
Shapes: M edits, width E.   Cost: a few multiply-adds per coordinate, 2·K·E more for a rest of K rows.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor

from steering.errors import DimensionMismatch, SpecError
from steering.law import TINY, Law
from steering.types import Form

ORTHONORMAL = 1e-3
"""How far a plane's or a rest's Gram matrix may be from I."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Edit(ABC):
    """What the edits share: strength a (M,) and cap ≥ 0 (M,), +inf for none.

    Raises DimensionMismatch when shapes disagree or there is no edit, SpecError on NaN and on numbers out of range.
    """

    strength: Tensor
    cap: Tensor
    channel: tuple[int, ...] = ()
    """The channel of the program whose knobs each edit follows; as they come where it is empty."""

    form: ClassVar[Form]
    _IDLE: ClassVar[dict[str, float]] = {}
    """What a tensor holds where a smaller edit is stored among larger ones; 0 where it is not listed."""

    def __post_init__(self) -> None:
        tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        if not self.strength.ndim == 1 or not len(self.strength):
            raise DimensionMismatch(f"strength: expected one number an edit, got shape {tuple(self.strength.shape)}.")
        for name, tensor in tensors.items():
            if tensor.shape[:1] != (self.rank,):
                raise DimensionMismatch(
                    f"{name}: expected one row for each of {self.rank} edits, got shape {tuple(tensor.shape)}."
                )
            if torch.isnan(tensor).any():
                raise SpecError(name, expected="numbers without NaN")
        if (self.cap < 0).any():
            raise SpecError("cap", expected="numbers >= 0")
        if not self.channel:
            object.__setattr__(self, "channel", tuple(range(self.rank)))
        self._check()

    @abstractmethod
    def _check(self) -> None:
        """What must be true of this form's own numbers."""

    @abstractmethod
    def _new(self, y_TE: Tensor, m: int) -> Tensor:
        """What edit m makes of y at its strength, before the bound."""

    @property
    def rank(self) -> int:
        """M."""
        return len(self.strength)

    @property
    @abstractmethod
    def widths(self) -> tuple[int, int]:
        """(E, E)."""

    @property
    def is_idle(self) -> bool:
        """Whether it can only measure: a turn or sparsity never."""
        return False

    def __call__(self, y_TE: Tensor, x_TD: Tensor) -> Tensor:
        """Equation (1), one edit after another, without a budget; returns a new y. The kernel must agree.

        x is what is read, which is y; given apart, the movement of x is added to y, as for a law.
        """
        start = x_TD
        for m in range(self.rank):
            if self.strength[m] == 0:
                continue
            u_TE = self._new(x_TD, m) - x_TD
            size_T1 = x_TD.norm(dim=-1, keepdim=True).clamp_min(TINY)
            rho_T1 = u_TE.norm(dim=-1, keepdim=True) / size_T1
            bound = self.cap[m].to(rho_T1.dtype)
            x_TD = x_TD + torch.where(rho_T1 > bound, u_TE * (bound / rho_T1), u_TE)
        return x_TD if y_TE is start else y_TE + (x_TD - start)

    def __rmul__(self, factor: float) -> Self:
        """Scales how much of the edit is applied."""
        return replace(self, strength=factor * self.strength)

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Self:
        """The same edit in another precision, on another device."""
        tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        moved: dict[str, Any] = {
            n: t.to(device, dtype if t.is_floating_point() else t.dtype) for n, t in tensors.items()
        }
        return replace(self, **moved)

    def resident(self) -> dict[str, Tensor]:
        """What a slot of the bank holds: all but the knobs, and which channel each edit follows."""
        kept = [f.name for f in fields(self) if f.name not in ("strength", "cap", "setpoint", "channel")]
        found = {name: getattr(self, name) for name in kept}
        found = {name: t.to(torch.float32) if t.is_floating_point() else t.to(torch.int32) for name, t in found.items()}
        return found | {"channel": torch.tensor(self.channel, dtype=torch.int32)}

    def knobs(self, rank: int) -> Tensor:
        """Setpoint, strength and cap (3, rank), float32; zero in channels that no edit of this route follows."""
        values = torch.zeros(3, rank)
        at = list(self.channel)
        setpoint = getattr(self, "setpoint", None)
        if setpoint is not None:
            values[0, at] = setpoint.to(torch.float32)
        values[1, at], values[2, at] = self.strength.to(torch.float32), self.cap.to(torch.float32)
        return values

    @classmethod
    def join(cls, parts: Sequence[tuple[Self | None, int]]) -> Self:
        """The edits of several interventions on one route, in order, each with the channels that it owns.

        `parts`: edit and channels; None where the intervention does not use the route.
        """
        edits, channels, start = [], [], 0
        for edit, rank in parts:
            if edit is not None:
                edits.append(edit)
                channels += [start + channel for channel in edit.channel]
            start += rank
        if len({edit.widths for edit in edits}) > 1:
            raise DimensionMismatch(f"edits of widths {sorted({e.widths for e in edits})} cannot act on one site")
        names = [f.name for f in fields(cls) if f.name != "channel"]
        whole: dict[str, Any] = {
            name: torch.cat(_alike([getattr(edit, name) for edit in edits], cls._IDLE.get(name, 0.0))) for name in names
        }
        return cls(**whole, channel=tuple(channels))


def _alike(tensors: Sequence[Tensor], idle: float) -> list[Tensor]:
    """The tensors with all dimensions after the first grown to the largest, by numbers that do nothing."""
    sizes = [max(t.shape[d] for t in tensors) for d in range(1, tensors[0].ndim)]
    grown = []
    for tensor in tensors:
        if list(tensor.shape[1:]) == sizes:
            grown.append(tensor)
            continue
        wide = tensor.new_full((len(tensor), *sizes), idle)
        wide[tuple(slice(n) for n in tensor.shape)] = tensor
        grown.append(wide)
    return grown


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Mask(Edit):
    """Equation (2): scale s, shift b, low and high, each (M, E)."""

    scale: Tensor
    shift: Tensor
    low: Tensor
    high: Tensor

    form: ClassVar[Form] = "mask"
    _IDLE: ClassVar[dict[str, float]] = {"scale": 1.0, "low": -math.inf, "high": math.inf}

    @classmethod
    def of(
        cls,
        scale: Tensor,
        shift: Tensor | float = 0.0,
        low: Tensor | float = -math.inf,
        high: Tensor | float = math.inf,
        *,
        strength: float = 1.0,
        cap: float = math.inf,
    ) -> Mask:
        """One mask from its scale (E,); the others are numbers or (E,)."""

        def row(value: Tensor | float) -> Tensor:
            return torch.as_tensor(value, dtype=scale.dtype).expand(scale.shape)[None].clone()

        one = scale.new_ones(1)
        return cls(
            scale=row(scale), shift=row(shift), low=row(low), high=row(high), strength=strength * one, cap=cap * one
        )

    def _check(self) -> None:
        if self.scale.ndim != 2 or not self.scale.shape == self.shift.shape == self.low.shape == self.high.shape:
            raise DimensionMismatch("scale, shift, low and high: expected (M, E) each, alike.")
        if not (torch.isfinite(self.scale).all() and torch.isfinite(self.shift).all()):
            raise SpecError("scale", expected="finite numbers, and in shift")

    @property
    def widths(self) -> tuple[int, int]:
        """(E, E)."""
        return self.scale.shape[1], self.scale.shape[1]

    @property
    def is_idle(self) -> bool:
        """Whether it leaves every coordinate as it is."""
        return bool(((self.scale == 1) & (self.shift == 0)).all())

    @property
    def is_blank(self) -> bool:
        """Whether it is one mask that takes all of the site away: what feeds the site need not be computed."""
        return self.rank == 1 and self.takes_all and bool(self.strength == 1 and self.cap == math.inf)

    @property
    def takes_all(self) -> bool:
        """Whether each of its masks, at full strength, leaves nothing of the site."""
        whole = (self.scale == 0) & (self.shift == 0) & (self.low == -math.inf) & (self.high == math.inf)
        return bool(whole.all())

    def _new(self, y_TE: Tensor, m: int) -> Tensor:
        scale, shift = self.scale[m].to(y_TE.dtype), self.shift[m].to(y_TE.dtype)
        inside = (y_TE >= self.low[m].to(y_TE.dtype)) & (y_TE <= self.high[m].to(y_TE.dtype))
        return torch.where(inside, y_TE + self.strength[m].to(y_TE.dtype) * (scale * y_TE + shift - y_TE), y_TE)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Turn(Edit):
    """Equation (3): plane (M, 2, E) of orthonormal rows, adaptive (M,) 0 or 1, setpoint θ (M,) in radians.

    An adaptive turn leaves alone what points away from b_1.
    """

    plane: Tensor
    adaptive: Tensor
    setpoint: Tensor

    form: ClassVar[Form] = "turn"

    @classmethod
    def of(
        cls, plane: Tensor, angle: float, *, adaptive: bool = False, strength: float = 1.0, cap: float = math.inf
    ) -> Turn:
        """One turn from its plane (2, E)."""
        one = plane.new_ones(1)
        return cls(
            plane=plane[None],
            adaptive=float(adaptive) * one,
            setpoint=angle * one,
            strength=strength * one,
            cap=cap * one,
        )

    def _check(self) -> None:
        if self.plane.ndim != 3 or self.plane.shape[1] != 2:
            raise DimensionMismatch(f"plane: expected (M, 2, E), got shape {tuple(self.plane.shape)}.")
        gram = self.plane.double() @ self.plane.double().mT
        if not ((gram - torch.eye(2, dtype=torch.float64)).abs() <= ORTHONORMAL).all():
            raise SpecError("plane", expected="two orthonormal rows")

    @property
    def widths(self) -> tuple[int, int]:
        """(E, E)."""
        return self.plane.shape[2], self.plane.shape[2]

    def _new(self, y_TE: Tensor, m: int) -> Tensor:
        plane = self.plane[m].to(y_TE.dtype)
        part_T2 = y_TE @ plane.mT
        angle_T = torch.atan2(part_T2[:, 1], part_T2[:, 0])
        turn_T = wrapped(self.setpoint[m].to(y_TE.dtype) - angle_T) * self.strength[m].to(y_TE.dtype)
        aim_T = angle_T + turn_T
        size_T1 = part_T2.norm(dim=-1, keepdim=True)
        new_T2 = size_T1 * torch.stack([aim_T.cos(), aim_T.sin()], dim=-1)
        turned = y_TE + (new_T2 - part_T2) @ plane
        if not self.adaptive[m]:
            return turned
        return torch.where(part_T2[:, :1] > 0, turned, y_TE)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Sparse(Edit):
    """Equation (4): weight w (M, E) ≥ 0, threshold (M,), count (M,) whole, rest R (M, K, E), orthonormal rows.

    Kept is what scores above the threshold where count is 0, else what scores at least the count-th largest score.
    """

    weight: Tensor
    threshold: Tensor
    count: Tensor
    rest: Tensor

    form: ClassVar[Form] = "sparse"

    @classmethod
    def of(
        cls,
        weight: Tensor,
        *,
        threshold: float = 0.0,
        count: int = 0,
        rest: Tensor | None = None,
        strength: float = 1.0,
        cap: float = math.inf,
    ) -> Sparse:
        """One edit from its weight (E,)."""
        one = weight.new_ones(1)
        return cls(
            weight=weight[None],
            threshold=threshold * one,
            count=torch.tensor([count], dtype=torch.int32),
            rest=(weight.new_zeros(0, len(weight)) if rest is None else rest)[None],
            strength=strength * one,
            cap=cap * one,
        )

    def _check(self) -> None:
        if self.weight.ndim != 2 or self.rest.ndim != 3 or self.rest.shape[2] != self.weight.shape[1]:
            raise DimensionMismatch("weight and rest: expected (M, E) and (M, K, E).")
        if not torch.isfinite(self.weight).all() or (self.weight < 0).any():
            raise SpecError("weight", expected="finite numbers >= 0")
        if (self.count < 0).any() or not torch.isfinite(self.rest).all():
            raise SpecError("count", expected="whole numbers >= 0, and a finite rest")

    @property
    def widths(self) -> tuple[int, int]:
        """(E, E)."""
        return self.weight.shape[1], self.weight.shape[1]

    def kept(self, y_TE: Tensor, m: int) -> Tensor:
        """Boolean (T, E): what edit m keeps."""
        score_TE = y_TE.abs() * self.weight[m].to(y_TE.dtype)
        count = int(self.count[m])
        if count == 0:
            return score_TE > self.threshold[m].to(y_TE.dtype)
        least_T1 = score_TE.topk(min(count, score_TE.shape[1]), dim=-1).values[:, -1:]
        return score_TE >= least_T1

    def _new(self, y_TE: Tensor, m: int) -> Tensor:
        lost_TE = y_TE.masked_fill(self.kept(y_TE, m), 0.0)
        rest = self.rest[m].to(y_TE.dtype)
        return y_TE + self.strength[m].to(y_TE.dtype) * ((lost_TE @ rest.mT) @ rest - lost_TE)


Acting = Law | Mask | Turn | Sparse
"""Whatever may act on a route."""
FORMS: dict[Form, type[Law] | type[Mask] | type[Turn] | type[Sparse]] = {
    "law": Law,
    "mask": Mask,
    "turn": Turn,
    "sparse": Sparse,
}


def joined(form: Form, parts: Sequence[tuple[Acting | None, int]]) -> Acting:
    """What several interventions do on one route of this form. Raises DimensionMismatch for unlike widths."""
    cls: Any = FORMS[form]
    for part, _ in parts:
        if part is not None and not isinstance(part, cls):
            raise DimensionMismatch(f"A route of form {form!r} takes a {cls.__name__}, got a {type(part).__name__}.")
    return cast("Acting", cls.join(parts))


def wrapped(angle: Tensor) -> Tensor:
    """The angle in (−π, π]."""
    return math.pi - torch.remainder(math.pi - angle, 2 * math.pi)
