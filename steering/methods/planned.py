"""What the methods on plans share: the plan's name, its layers, and laws of several channels under one bound."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from steering.edit import Acting, Mask
from steering.errors import SpecError
from steering.law import Law
from steering.methods.base import Applied, checked_layers
from steering.program import Scope, Term, Window
from steering.types import Reported, Route

_END = 2**31
"""Beyond every prompt."""


@dataclass(frozen=True, kw_only=True)
class PlanIntervention(Applied):
    """An intervention on a plan. A subclass adds `type` and `compile`."""

    plan: str = field(metadata={"description": "Name of the plan, as `GET /v1/steering/artifacts` lists it."})

    def chosen_layers(self, layers: tuple[int, ...], depth: int) -> tuple[int, ...]:
        """The blocks to act on, ascending: those asked for, of `layers`, which the plan has. Raises SpecError."""
        chosen = layers if self.layers is None else checked_layers(self.layers, depth)
        for layer in chosen:
            if layer not in layers:
                raise SpecError("layers", expected=f"layers that plan {self.plan!r} has, {list(layers)}", got=layer)
        return chosen

    def law(
        self, probe_RD: Tensor, setpoint_R: Tensor, gain_RE: Tensor, *, share: float = 1.0, orthonormal: bool = True
    ) -> Law:
        """A law of R channels that applies `share` of the control and keeps to `max_effort` as a whole.

        The bound is shared out, for a law knows one bound a channel: cap/√R each where the gains are orthonormal
        (‖u‖² is then the sum of the channels' squares), cap/R else. It errs on the safe side: control that falls on few
        channels is stopped before the whole reaches the bound.
        """
        rank = len(gain_RE)
        cap = self.cap / (math.sqrt(rank) if orthonormal else rank)
        return Law.of(probe_RD, setpoint_R, gain_RE, strength=self.strength * share, cap=cap)

    def planned_term(
        self,
        type_: str,
        laws: Mapping[Route, Acting],
        scope: Scope | None = None,
        *,
        units: Reported = "centred",
        target: float | None = None,
        gauges: Mapping[Route, tuple[float, float]] | None = None,
        scopes: tuple[Scope, ...] = (),
    ) -> Term:
        """The compiled term. Raises SpecError when nothing would happen: the request would be served unsteered.

        units, target, gauges, scopes: as of `Term`. Without gauges, masks report the share that they act on.
        """
        if all(law.is_idle for law in laws.values()):
            raise SpecError("plan", expected=f"a plan on which {type_} has an effect", got=self.plan)
        where = self.apply if scope is None else scope
        if gauges is None:
            gauges = shares(laws)
            units = "fraction" if gauges else units
        return Term(self.plan, type_, laws, where, units, target, gauges, scopes=scopes)


def shares(laws: Mapping[Route, Acting]) -> dict[Route, tuple[float, float]]:
    """Gauges of the masks among `laws`: which share of its site each acts on."""
    return {route: (0.0, 1.0) for route, law in laws.items() if isinstance(law, Mask)}


def without_first(scope: Scope) -> Scope:
    """`scope` with position 0 left out of `prompt: all`. Positions and windows that a caller wrote out stay."""
    return Scope(Window((1, _END)), scope.generation) if scope.prompt == "all" else scope
