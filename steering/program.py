"""What the engine is given for one request: compiled interventions, where they act, and the request's guard.

A `Term` is one intervention after compilation: laws and edits by route, its scope, and how to translate what its probes
measure back into the caller's units. A `Program` is the superposition of a request's terms.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor

from steering.condition import Gate
from steering.edit import Acting, Mask, joined
from steering.errors import SpecError
from steering.types import Reported, Route, Site

MAX_POSITIONS = 4096
"""Most positions that one selector may list."""


@dataclass(frozen=True)
class Positions:
    """Chosen prompt positions; negative ones count from the end of the prompt."""

    __pydantic_config__: ClassVar[Mapping[str, str]] = {"extra": "forbid"}
    positions: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 0 < len(self.positions) <= MAX_POSITIONS:
            raise SpecError("positions", expected=f"1 to {MAX_POSITIONS} positions", got=len(self.positions))
        for position in self.positions:
            if not isinstance(position, int):
                raise SpecError("positions", expected="whole numbers", got=position)


@dataclass(frozen=True)
class Window:
    """A half-open range [a, b). In a prompt negative ends count from its end; in generation steps count from 0."""

    __pydantic_config__: ClassVar[Mapping[str, str]] = {"extra": "forbid"}
    window: tuple[int, int]

    def __post_init__(self) -> None:
        if len(self.window) != 2 or not all(isinstance(end, int) for end in self.window):
            raise SpecError("window", expected="two whole numbers [a, b]", got=self.window)
        start, stop = self.window
        if (start < 0) == (stop < 0) and start > stop:
            raise SpecError("window", expected="a <= b", got=list(self.window))


@dataclass(frozen=True)
class Scope:
    """At which tokens an intervention acts: prompt positions and 0-based decode steps.

    A decode step is the forward pass of a generated token. The first generated token is drawn from the pass of the last
    prompt token, which `prompt: last` steers. Raises SpecError for a selector that does not exist: it would select
    nothing.
    """

    __pydantic_config__: ClassVar[Mapping[str, str]] = {"extra": "forbid"}
    prompt: Literal["none", "last", "all"] | Positions | Window = "last"
    generation: Literal["none", "all"] | Window = "all"

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, Positions | Window) and self.prompt not in ("none", "last", "all"):
            raise SpecError("prompt", expected="none, last, all, positions or a window", got=self.prompt)
        if isinstance(self.generation, Window):
            if not 0 <= self.generation.window[0] <= self.generation.window[1]:
                raise SpecError("generation.window", expected="0 <= a <= b", got=list(self.generation.window))
        elif self.generation not in ("none", "all"):
            raise SpecError("generation", expected="none, all or a window", got=self.generation)

    def prompt_mask(self, length: int) -> np.ndarray:
        """Boolean (length,): which prompt positions are steered. Positions outside the prompt select nothing."""
        mask = np.zeros(length, dtype=bool)
        match self.prompt:
            case "all":
                mask[:] = True
            case "last":
                mask[-1:] = True
            case Positions(positions):
                mask[[p for p in positions if -length <= p < length]] = True
            case Window((start, stop)):
                mask[slice(start, stop)] = True
        return mask

    def steers_step(self, step: int) -> bool:
        """Whether decode step `step` is steered."""
        match self.generation:
            case Window((start, stop)):
                return start <= step < stop
            case generation:
                return generation == "all"


@dataclass(frozen=True)
class Guard:
    """Bounds on a whole request.

    max_effort bounds the sum over layers of ‖u_l‖/‖x_l‖ at each token; where several routes write one block (S-PID)
    their efforts are added before they are compared, which errs on the safe side. max_kl bounds, in nats and per token,
    how far the next-token distribution may move from that of the unsteered twin, which runs in the same batch.
    """

    __pydantic_config__: ClassVar[Mapping[str, str]] = {"extra": "forbid"}
    max_effort: float | None = None
    max_kl: float | None = None
    on_nonfinite: Literal["abort"] = "abort"

    def __post_init__(self) -> None:
        for name in ("max_effort", "max_kl"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise SpecError(name, expected="a finite number >= 0", got=value)

    @property
    def budget(self) -> float:
        """`max_effort`, +inf when there is none."""
        return math.inf if self.max_effort is None else self.max_effort


@dataclass(frozen=True, eq=False)
class Term:
    """One compiled intervention.

    laws: what acts, by route: laws and, on routes of their forms, edits.
    gauges: per route (origin, scale), so that (z − origin)/scale is the measurement z of channel 0 in the caller's
    units; only the routes that report are listed. target: the setpoint in those units, None where the method has none.
    gate: the condition under which the term acts, None for always. scopes: one for each channel where they differ, of
    laws alone; they then take the place of `scope`. is_whole: it is done whole or not at all, so that no budget may
    leave a part of it.
    """

    label: str
    type: str
    laws: Mapping[Route, Acting]
    scope: Scope = Scope()
    units: Reported = "centred"
    target: float | None = None
    gauges: Mapping[Route, tuple[float, float]] = field(default_factory=dict)
    gate: Gate | None = None
    scopes: tuple[Scope, ...] = ()
    is_whole: bool = False

    @property
    def rank(self) -> int:
        """Channels that this term owns on every route."""
        return max((law.rank for law in self.laws.values()), default=0)

    @property
    def is_always(self) -> bool:
        """Whether it acts at every token of a request, whatever is measured."""
        whole = (self.scope.prompt, self.scope.generation) == ("all", "all")
        return whole and self.gate is None and not self.scopes

    @property
    def is_in_time(self) -> bool:
        """Whether it can act at the very token where its gate is measured: a gain is spent behind the gate."""
        if self.gate is None:
            return True
        return any(self.gate.decides(route) and not law.is_idle for route, law in self.laws.items())

    @property
    def acts(self) -> bool:
        """False when every strength is zero or the scope selects nothing: the term then leaves the model alone."""
        scopes = self.scopes or (self.scope,)
        somewhere = any((scope.prompt, scope.generation) != ("none", "none") for scope in scopes)
        return somewhere and any(bool((law.strength != 0).any()) for law in self.laws.values())


@dataclass(frozen=True, eq=False)
class Program:
    """The superposition of a request's terms, and its guard. `Program()` steers nothing."""

    terms: tuple[Term, ...] = ()
    guard: Guard = Guard()

    @cached_property
    def laws(self) -> dict[Route, Acting]:
        """What acts, by route, with aligned channels: term i owns `channels[i]` on every route."""
        return superpose([term.laws for term in self.terms])

    @cached_property
    def blanks(self) -> frozenset[Site]:
        """The sites of which nothing is left at any token, so that what feeds them need not be computed.

        None under a budget, which might leave something.
        """
        if self.guard.max_effort is not None:
            return frozenset()
        always = {
            c for t, own in zip(self.terms, self.channels, strict=True) if t.is_always for c in range(self.rank)[own]
        }
        return frozenset(
            route.write
            for route, law in self.laws.items()
            if isinstance(law, Mask) and law.is_blank and always.issuperset(law.channel)
        )

    @cached_property
    def channels(self) -> tuple[slice, ...]:
        """The channels of each term."""
        ends = np.cumsum([0, *(term.rank for term in self.terms)])
        return tuple(slice(int(a), int(b)) for a, b in pairwise(ends))

    @property
    def rank(self) -> int:
        """Channels in all."""
        return sum(term.rank for term in self.terms)

    @cached_property
    def acts(self) -> bool:
        """Whether any term does anything. A program that does not is served as if it were absent, bit for bit."""
        return any(term.acts for term in self.terms)

    @cached_property
    def shape(self) -> str:
        """Fingerprint of what must be resident on the device: probes, gains, limits, masks, planes.

        Setpoints, strengths, caps, scopes and guards are per-request knobs, so sweeping them costs no slot.
        """
        sha = hashlib.sha256()
        for route, law in self.laws.items():
            _feed(sha, route, law.resident())
        return f"sha256:{sha.hexdigest()}"

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of everything: equal fingerprints steer alike."""
        around = [
            [
                t.label,
                t.type,
                t.units,
                t.target,
                *map(asdict, t.scopes or (t.scope,)),
                *([t.gate.digest()] if t.gate else []),
            ]
            for t in self.terms
        ]
        sha = hashlib.sha256(json.dumps([self.shape, around, asdict(self.guard)]).encode())
        for route, law in self.laws.items():
            _feed(sha, route, {"knobs": law.knobs(self.rank)})
        return f"sha256:{sha.hexdigest()}"


def _feed(sha: hashlib._Hash, route: Route, tensors: Mapping[str, Tensor]) -> None:
    """Give a hash what stands on a route, by name, shape and bytes."""
    sha.update(str(route).encode())
    for name, tensor in tensors.items():
        sha.update(f"{name}{tuple(tensor.shape)}".encode())
        sha.update(tensor.contiguous().numpy().tobytes())


def check_whole(terms: Sequence[Term], guard: Guard) -> None:
    """Raises SpecError where a budget would leave a part of what is done whole or not at all."""
    for term in terms:
        if term.is_whole and term.acts and guard.max_effort is not None:
            expected = f"null beside {term.type}, which is done whole or not at all"
            raise SpecError("guard.max_effort", expected=expected, got=guard.max_effort)


def superpose(parts: Sequence[Mapping[Route, Acting]]) -> dict[Route, Acting]:
    """Join several interventions route by route, channels aligned.

    Intervention i owns the same channels on every route (as many as its widest law), so that a per-request knob or a
    scope is a mask over channels, whatever the route. Laws of one route superpose, which knows no order; edits follow
    each other in the order of the interventions. Raises DimensionMismatch when two give one route unlike widths.
    """
    ranks = [max((law.rank for law in part.values()), default=0) for part in parts]
    routes = sorted({route for part in parts for route in part})
    return {
        route: joined(route.form, [(p.get(route), n) for p, n in zip(parts, ranks, strict=True)]) for route in routes
    }
