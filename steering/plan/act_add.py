"""Plan of `act_add`: what one prompt has at its first positions that another has not, at the blocks' inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steering.plan.base import MAX_RANK, Plan


@dataclass(frozen=True, eq=False, kw_only=True)
class ActAddPlan(Plan):
    """The differences of two prompts padded to P tokens, at the inputs of n blocks.

    layers (n,) · difference (n, P, D) · control (n, P, D) random directions of the same lengths.
    """

    kind: ClassVar[str] = "act_add"

    layers: tuple[int, ...]
    difference: Tensor
    control: Tensor

    def _is_whole(self) -> bool:
        n, (_, P, _) = len(self.layers), self.difference.shape
        return (
            self.are_layers(self.layers)
            and 0 < P <= MAX_RANK
            and self.difference.shape == self.control.shape == (n, P, self.width)
            and bool(torch.isfinite(self.difference).all() and torch.isfinite(self.control).all())
        )
