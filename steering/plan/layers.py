"""Plan of `skip_layers`: how little each attention and MLP turns the residual stream, and in what order they go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from steering.plan.base import Plan

Module = Literal["attention", "mlp"]


@dataclass(frozen=True, eq=False, kw_only=True)
class LayersPlan(Plan):
    """Scores of the attentions and MLPs of L blocks, and two orders of all 2L modules.

    score (2, L): mean cosine of the stream before and after the attention and the MLP of each block · influence (L,):
    1 − that of the whole block · order (2L,): modules by falling score, the attention of block l as l, its MLP as L + l
    · control (2L,): a random order.
    """

    kind: ClassVar[str] = "layers"

    score: Tensor
    influence: Tensor
    order: tuple[int, ...]
    control: tuple[int, ...]

    def joint(self, *, control: bool = False) -> list[tuple[Module, int]]:
        """All modules, those that go first at the front."""
        modules: tuple[Module, Module] = ("attention", "mlp")
        order = self.control if control else self.order
        return [(modules[index // self.depth], index % self.depth) for index in order]

    def ordered(self, module: Module, *, control: bool = False) -> list[int]:
        """The blocks whose attention or MLP goes first, in order."""
        return [layer for found, layer in self.joint(control=control) if found == module]

    def blocks(self, *, control: bool = False) -> list[int]:
        """Whole blocks, least influence first; at random as their attentions stand in the control."""
        if control:
            return self.ordered("attention", control=True)
        return self.influence.argsort(stable=True).tolist()

    def _is_whole(self) -> bool:
        if self.score.shape != (2, self.depth):  # before anything is made that is as long as the depth it claims
            return False
        every = list(range(2 * self.depth))
        in_order = self.score.flatten()[list(self.order)] if sorted(self.order) == every else self.score[:, :0]
        return (
            self.influence.shape == (self.depth,)
            and all(type(index) is int for index in (*self.order, *self.control))
            and sorted(self.order) == sorted(self.control) == every
            and bool(
                (self.score.abs() <= 1.001).all() and ((self.influence >= -0.001) & (self.influence <= 2.001)).all()
            )
            and bool((in_order.diff() <= 0).all())
        )
