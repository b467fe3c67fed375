"""Laws on a real model by plain hooks: the long way round, against which no engine is needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from steering.edit import Acting
from steering.plan import Plan
from steering.plant.massive import Caution
from steering.plant.plant import Plant
from steering.types import Route, Site


class OnePlan:
    """A bench that has one plan and nothing else."""

    def __init__(self, plan: Plan) -> None:
        self.depth, self.width, self.caution = plan.depth, plan.width, Caution()
        self._plan = plan

    def plan(self, name: str, kind: type) -> Any:
        """The plan."""
        assert isinstance(self._plan, kind)
        return self._plan


def hook_laws(plant: Plant, shell: nn.Module, laws: Mapping[Route, Acting], dtype: torch.dtype) -> None:
    """Apply laws at every token of `shell`'s forward passes."""
    read: dict[Site, Tensor] = {}

    def keep(site: Site) -> Any:
        return lambda x: read.update({site: x})

    def act(route: Route, law: Acting) -> Any:
        return lambda y: law(y.flatten(0, -2), read[route.read].flatten(0, -2)).view_as(y)

    for route, law in laws.items():
        plant.tap(shell, route.read, keep(route.read))
        plant.tap(shell, route.write, act(route, law.to(dtype)))
