"""What the settings of several fits check alike."""

from __future__ import annotations

from collections.abc import Sequence

from steering.errors import SpecError
from steering.fit.concept import FitSettings, PositionRule


class ReadsExamples:
    """Settings with `positions` and `skip`, which say what is read of an example."""

    positions: PositionRule
    skip: int

    def reading(self) -> FitSettings:
        """The part that says what is read, as a concept's settings hold it. Raises SpecError for impossible values."""
        return FitSettings(positions=self.positions, skip=self.skip)


def chosen_blocks(layers: Sequence[int] | None, depth: int, usual: Sequence[int] | None = None) -> tuple[int, ...]:
    """The blocks of a model with `depth` blocks, ascending and each once; `usual`, or all, where none are named.

    Raises SpecError for none, and for one that the model does not have.
    """
    if layers is None:
        return tuple(range(depth) if usual is None else usual)
    chosen = tuple(sorted(set(layers)))
    if not chosen or chosen[0] < 0 or chosen[-1] >= depth:
        raise SpecError("layers", expected=f"layers in 0..{depth - 1}", got=list(layers))
    return chosen
