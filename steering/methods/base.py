"""What interventions share: where, when and how much they act; for those on a concept, how it is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from steering.concept import Concept
from steering.condition import Gate, When
from steering.control import setpoints
from steering.edit import Acting
from steering.errors import SpecError
from steering.law import Law
from steering.program import Positions, Scope, Term
from steering.registry import Bench
from steering.types import Route, Units, across

LARGEST = torch.finfo(torch.float32).max
"""Laws are resident in float32: a larger number would become infinite there."""


def checked_number(name: str, value: float, *, least: float = -LARGEST, most: float = LARGEST) -> None:
    """Raises SpecError unless `value` is a number in [least, most]."""
    if not isinstance(value, int | float) or not least <= value <= most:
        raise SpecError(name, expected=f"a finite number in [{least:.3g}, {most:.3g}]", got=value)


@dataclass(frozen=True, kw_only=True)
class Applied:
    """Fields common to all interventions: how much, in which blocks, at which tokens, on which condition.

    Described in their metadata: of docstrings under fields, the schema finds only those of the method's own class.
    """

    strength: float = field(
        default=1.0,
        metadata={"description": "How much of the control is applied; 0 is bit-for-bit the unsteered output."},
    )
    layers: tuple[int, ...] | None = field(
        default=None,
        metadata={"description": "Blocks to act on, counted from 0; null means those the method was fitted for."},
    )
    apply: Scope = field(default=Scope(), metadata={"description": "Prompt positions and decode steps to act on."})
    when: When | None = field(
        default=None,
        metadata={"description": "Act only where the projection on a concept is in bounds; null means always."},
    )
    max_effort: float | None = field(
        default=None, metadata={"description": "Largest ‖u‖/‖x‖ per layer and token; null means no bound."}
    )
    spare_massive: bool = field(
        default=True,
        metadata={
            "description": "Leave the model's massive activations alone: their coordinates, and position 0 in `all`."
        },
    )

    def __post_init__(self) -> None:
        checked_number("strength", self.strength)
        if self.max_effort is not None:
            checked_number("max_effort", self.max_effort, least=0.0)

    @property
    def cap(self) -> float:
        """`max_effort`, +inf when there is none."""
        return math.inf if self.max_effort is None else self.max_effort


@dataclass(frozen=True, kw_only=True)
class MaybeConcept(Applied):
    """An intervention that may act on a fitted concept."""

    concept: str | None = field(
        default=None,
        metadata={"description": "Name of the fitted concept, as `GET /v1/steering/artifacts` lists it."},
    )

    def chosen_layers(self, concept: Concept) -> tuple[int, ...]:
        """The blocks to act on, ascending. Raises SpecError for a block that the model or the fit does not have."""
        if self.layers is None:
            return concept.layers
        return checked_layers(self.layers, concept.depth)

    def term(
        self,
        type_: str,
        concept: Concept,
        laws: Mapping[Route, Acting],
        layers: tuple[int, ...],
        *,
        target: float | None = None,
        units: Units = "centred",
    ) -> Term:
        """The compiled term; reports the projection at the inputs of `layers`, translated to `units`.

        Raises SpecError when no law has a gain, for the request would then be served unsteered.
        """
        if all(law.is_idle for law in laws.values()):
            raise SpecError(
                "layers", expected=f"layers where {type_} on concept {self.concept!r} has an effect", got=list(layers)
            )
        return Term(self.concept or type_, type_, laws, self.apply, units, target, gauges(concept, layers, units))


@dataclass(frozen=True, kw_only=True)
class ConceptIntervention(MaybeConcept):
    """An intervention on one fitted concept."""

    concept: str = field(
        metadata={"description": "Name of the fitted concept, as `GET /v1/steering/artifacts` lists it."}
    )


def checked_layers(layers: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """`layers`, ascending and each once. Raises SpecError for none, or for a block that the model does not have."""
    if not layers:
        raise SpecError("layers", expected="at least one layer, or null for the method's own choice", got=[])
    for layer in layers:
        if not 0 <= layer < depth:
            raise SpecError("layers", expected=f"layers in 0..{depth - 1}", got=layer)
    return tuple(sorted(set(layers)))


def conditioned(term: Term, when: When, bench: Bench) -> Term:
    """`term` behind the gate that `when` describes.

    At the token where it is measured, the gate is known from its own block on. Measured anew at every token, the laws
    of earlier blocks are left out. Raises what `Bench.concept` raises, and SpecError for a layer that the model or the
    concept does not have, for bounds that no float32 meets, and where the gate is never known in time.
    """
    concept = bench.concept(when.concept)
    if not 0 <= when.layer < concept.depth:
        raise SpecError("layer", expected=f"a layer in 0..{concept.depth - 1}", got=when.layer)
    schedule = setpoints(when.units, concept.origin, concept.magnitude)
    origin, scale = float(schedule.origin_L[when.layer]), float(schedule.scale_L[when.layer])
    if not concept.direction[when.layer].any() or scale <= 0:
        raise SpecError("layer", expected=f"a layer where concept {when.concept!r} has a direction", got=when.layer)
    low = -math.inf if when.above is None else origin + scale * when.above
    high = math.inf if when.below is None else origin + scale * when.below
    # Rounded as the device compares them, so that the account says what was done also at the very edge.
    low, high = (float(torch.tensor(bound, dtype=torch.float32)) for bound in (low, high))
    if not low < high:
        name = "above" if when.below is None else "below"
        raise SpecError(name, expected="bounds with a float32 between them", got=getattr(when, name))
    scopes = term.scopes or (term.scope,)
    if when.on == "prompt" and not any(_is_in_reach(scope) for scope in scopes):
        expected = f"token: {term.type} acts at positions of the prompt that come before its last, where it is asked"
        raise SpecError("on", expected=expected, got=when.on)
    gate = Gate(when, concept.direction[when.layer], low, high, origin, scale)
    gated = replace(term, gate=gate)
    if not gated.is_in_time and (when.on == "token" or term.scope.generation == "none"):
        raise SpecError("layer", expected="a layer not behind all those that the intervention acts on", got=when.layer)
    if when.on == "prompt":
        return gated
    laws = {route: law for route, law in term.laws.items() if gate.decides(route)}
    kept = {route: scale for route, scale in term.gauges.items() if route in laws}
    return replace(gated, laws=laws, gauges=kept)


def _is_in_reach(scope: Scope) -> bool:
    """Whether what is decided at the prompt's last token can still hold for all that a scope names, or for a decode
    step."""
    return scope.generation != "none" or scope.prompt in ("last", "all", Positions((-1,)))


def gauges(concept: Concept, layers: tuple[int, ...], units: Units = "centred") -> dict[Route, tuple[float, float]]:
    """(origin, scale) of the projections at the inputs of `layers`, for those where the concept has a scale."""
    schedule = setpoints(units, concept.origin, concept.magnitude)
    return {
        across(layer): (float(schedule.origin_L[layer]), float(schedule.scale_L[layer]))
        for layer in layers
        if schedule.scale_L[layer] > 0
    }


def targets(concept: Concept, units: Units, setpoint: float) -> Tensor:
    """β_l (L+1,) for a setpoint in the caller's units. Raises SpecError when it leaves float32."""
    beta = setpoints(units, concept.origin, concept.magnitude).beta(setpoint)
    if not torch.isfinite(beta).all():
        raise SpecError("setpoint", expected="a setpoint whose target is a finite float32", got=setpoint)
    return beta


def meter(direction: Tensor, setpoint: float | Tensor = 0.0, *, strength: float = 1.0) -> Law:
    """A law without a gain: measures v·x and spends nothing.

    strength: that of the intervention it reports on, so that a term of strength 0 is seen to do nothing.
    """
    return Law.of(direction, setpoint, torch.zeros_like(direction), strength=strength)
