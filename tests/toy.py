"""A linear network of a few layers, a concept fitted on it by hand, and the loop that applies laws to it.

x_{l+1} = A_l x_l + u_l        the plant of every oracle in tests/methods, in float64
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from steering.concept import Concept
from steering.control import Weights, regulate
from steering.errors import SpecError
from steering.law import Law
from steering.plan import Plan
from steering.plant.massive import Caution
from steering.types import Route, Site
from tests.control.cases import directions, jacobians

MODEL = "sha256:" + "ab" * 32
WEIGHTS = Weights(0.7, 1.3, 2.0)
P = TypeVar("P", bound=Plan)


@dataclass(frozen=True)
class Toy:
    """The network and its concept: the `Bench` of the tests."""

    A_LDD: Tensor
    K_LDD: Tensor
    """Gains of the controlled layers, formed explicitly; zero elsewhere."""
    tone: Concept
    plans: Mapping[str, Plan] = field(default_factory=dict)
    caution: Caution = field(default_factory=Caution)

    @property
    def depth(self) -> int:
        return self.A_LDD.shape[0]

    @property
    def width(self) -> int:
        return self.A_LDD.shape[1]

    def concept(self, name: str) -> Concept:
        if name != self.tone.name:
            raise SpecError("concept", expected=f"a concept of this model ({self.tone.name})", got=name)
        return self.tone

    def plan(self, name: str, kind: type[P]) -> P:
        found = self.plans.get(name)
        if not isinstance(found, kind):
            raise SpecError("plan", expected=f"a plan of kind {kind.kind!r} of this model", got=name)
        return found

    def resident(self) -> Toy:
        """The same with the concept in float32, as a fit stores it."""
        single = {name: getattr(self.tone, name).float() for name in ("direction", "magnitude", "origin")}
        gains = {name: gain.float() for name, gain in self.tone.gains.items()}
        return replace(self, tone=replace(self.tone, gains=gains, **single))


def toy(depth: int = 4, width: int = 6, first: int = 1, seed: int = 0) -> Toy:
    """A network whose blocks `first` … depth − 1 are controlled."""
    A_LDD, v_LD = jacobians(depth, width, seed), directions(depth + 1, width, seed)
    K_LDD = torch.zeros_like(A_LDD)
    K_LDD[first:] = regulate(A_LDD[first:], WEIGHTS).K_LDD
    generator = torch.Generator().manual_seed(seed + 2)
    magnitude_L = 0.5 + torch.rand(depth + 1, generator=generator, dtype=torch.float64)
    origin_L = torch.randn(depth + 1, generator=generator, dtype=torch.float64)
    dense_LD = torch.einsum("lij,lj->li", K_LDD, v_LD[:-1])
    layers = tuple(range(first, depth))
    concept = Concept(
        "tone", MODEL, v_LD, magnitude_L, origin_L, {"dense": dense_LD}, layers, WEIGHTS, "dense", {"auroc": [0.5]}
    )
    return Toy(A_LDD, K_LDD, concept)


def states(n_tokens: int, width: int, seed: int = 5) -> Tensor:
    """States (T, D) at the first block's input."""
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(n_tokens, width, generator=generator, dtype=torch.float64)


def run(A_LDD: Tensor, laws: Mapping[Route, Law], x_TD: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Apply laws along the network; returns the block inputs x_l as the blocks saw them, and the block outputs."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    for layer, A_DD in enumerate(A_LDD):
        for route, law in laws.items():
            if route.write == Site("resid_pre", layer):
                x_TD = law(x_TD, x_TD)
        inputs.append(x_TD)
        x_TD = x_TD @ A_DD.mT
        for route, law in laws.items():
            if route.write == Site("resid_post", layer):
                x_TD = law(x_TD, x_TD if route.read == route.write else inputs[route.read.layer])
        outputs.append(x_TD)
    return inputs, outputs
