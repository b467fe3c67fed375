"""What is compared: each method with the strengths that are tried, as interventions on one concept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from steering.concept import Concept
from steering.errors import SpecError
from steering.methods import Ablate, Add, Clamp, Lqr, Pid
from steering.methods.base import gauges, meter
from steering.methods.guards import guarded
from steering.program import Program, Scope, Term
from steering.registry import Bench, Intervention
from steering.types import Gains, across

GRID = (1.0, 1.5, 2.0, 3.0, 4.0)
"""Setpoints λ (centred) and multiples of one contrast: the two are commensurate, see `steering.methods.add`."""

METHODS: Mapping[str, tuple[float, ...]] = {
    "none": (0.0,),
    "add": (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0),  # open loop, it needs more against a prompt that pushes the other way
    "ablate": (0.5, 1.0),
    "clamp": GRID,
    "pid": GRID,
    "lqr dense": GRID,
    "lqr matrix-free": GRID,
    "lqr A=I": GRID,
}
"""Methods of the table and their grids. `lqr A=I` is the same regulator without the Jacobian."""

LQR_GAINS: Mapping[str, Gains] = {"lqr dense": "dense", "lqr matrix-free": "matrix_free", "lqr A=I": "identity"}


@dataclass(frozen=True)
class Condition:
    """One method at one strength on one concept."""

    concept: str
    method: str
    strength: float

    @property
    def scope(self) -> Scope:
        """Where the concept is applied: refusal and compliance where they were read, the prompt's last token."""
        return Scope("last", "none") if self.concept in ("refusal", "compliance") else Scope()

    def intervention(self) -> Intervention | None:
        """The intervention, or None for the unsteered model. Raises SpecError for a method that the table lacks."""
        concept, strength = self.concept, self.strength
        found: Intervention | None = None
        match self.method:
            case "add":
                found = Add(concept=concept, apply=self.scope, strength=strength)
            case "ablate":
                found = Ablate(concept=concept, apply=self.scope, strength=strength)
            case "clamp":
                found = Clamp(concept=concept, apply=self.scope, setpoint=strength)
            case "pid":
                found = Pid(concept=concept, apply=self.scope, setpoint=strength)
            case method if method in LQR_GAINS:
                found = Lqr(concept=concept, apply=self.scope, setpoint=strength, gains=LQR_GAINS[method])
            case method if method != "none":
                raise SpecError("method", expected=f"one of {', '.join(METHODS)}", got=method)
        return found

    def program(self, bench: Bench) -> Program:
        """What the engine runs. The unsteered model carries meters, which measure and do nothing."""
        intervention = self.intervention()
        if intervention is None:
            return Program((meters(bench.concept(self.concept), self.scope),))
        return Program((guarded(intervention.compile(bench), bench),))


def meters(concept: Concept, scope: Scope = Scope()) -> Term:
    """A term that measures v_l·x_l at the controlled layers of a concept and acts on nothing."""
    laws = {across(layer): meter(concept.direction[layer]) for layer in concept.layers}
    return Term(concept.name, "meter", laws, scope, gauges=gauges(concept, concept.layers))
