"""Conditions: an intervention acts only where the measured projection on a concept says so.

    λ = (v_l·x_l − origin_l) / scale_l            the gate is open where  above < λ < below

x_l is the input of block l as the blocks before it leave it, the very quantity that a capture reports; a law that
writes this input itself, as `ablate` and `clamp` do, comes after the gate, and a trace reports what it made of it.
Conditional steering as in CAST (arXiv:2409.05907, Sec. 3), with a projection in a setpoint's units instead of a cosine.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from steering.errors import SpecError
from steering.types import Route, Site, Units

On = Literal["prompt", "token"]


@dataclass(frozen=True, kw_only=True)
class When:
    """The condition of an intervention, as a request states it. Raises SpecError for bounds that nothing can meet."""

    __pydantic_config__: ClassVar[Mapping[str, object]] = {"extra": "forbid", "use_attribute_docstrings": True}

    concept: str
    """Name of the fitted concept that is measured."""
    layer: int
    """Block at whose input it is measured."""
    above: float | None = None
    """Act where the projection is greater than this."""
    below: float | None = None
    """Act where the projection is less than this."""
    on: On = "prompt"
    """`prompt`: measured once, at the prompt's last token, and decided from there on; `token`: at every token anew."""
    units: Units = "centred"
    """Units of `above` and `below`: `centred`, `contrast` or `absolute`."""

    def __post_init__(self) -> None:
        for name in ("above", "below"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise SpecError(name, expected="a finite number", got=value)
        if self.above is None and self.below is None:
            raise SpecError("above", expected="a bound: above, below or both")
        if self.above is not None and self.below is not None and self.above >= self.below:
            raise SpecError("below", expected=f"a number greater than above = {self.above:g}", got=self.below)
        if self.on not in ("prompt", "token"):
            raise SpecError("on", expected="prompt or token", got=self.on)


@dataclass(frozen=True, eq=False)
class Gate:
    """A compiled condition: probe (D,) float32 at the input of block `layer`, open where low < probe·x < high.

    origin and scale translate the measurement into the units of `when`.
    """

    when: When
    probe: Tensor
    low: float
    high: float
    origin: float
    scale: float

    @property
    def site(self) -> Site:
        """Where it measures."""
        return Site("resid_pre", self.when.layer)

    def decides(self, route: Route) -> bool:
        """Whether a law on `route` writes at or after the place where this gate measures, within one token."""
        return route.write.tap == "final" or route.write.layer >= self.when.layer

    def is_open(self, measured: float) -> bool:
        """The gate's answer to one measurement; False for NaN."""
        return self.low < measured < self.high

    def in_units(self, measured: float) -> float:
        """A measurement in the units of the condition."""
        return (measured - self.origin) / self.scale

    def digest(self) -> str:
        """Fingerprint of what it measures and of its bounds."""
        sha = hashlib.sha256(f"{self.when.layer} {self.when.on} {self.low!r} {self.high!r}".encode())
        sha.update(self.probe.to(torch.float32).contiguous().numpy().tobytes())
        return sha.hexdigest()
