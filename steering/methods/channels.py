"""Channels: remove, scale or hold what one head tells later heads along a component of its output.

    c = a_h·p,   p = W_Oᵀ v                            a_h the output of head h before W_O, v a component of W_OV
    y' = y + (γ − 1) c v      scaled: γ = 0 removes it, 2 doubles it, −1 inverts it
    y' = y + (β − c) v        held at β

Removing a component is putting its singular value σ of W_OV to zero, scaling it is γσ, without another W_O. The law
reads the heads' outputs and writes the attention's. Components of one head are orthogonal, those of several heads add.
What goes is what the head writes there: every reader of it is concerned, not the one alone that made it a channel. With
a norm behind the attention (Gemma, OLMo-2) the component is the one of the normed output, by linearity in front of it;
what the norm divides by then changes too.
Shapes: p (d,) in the head's columns, v (D,).   Cost: 2·(H d + D) multiply-adds per token and component. `max_effort` is
relative to the heads' outputs and shared out over the components of a block.
Source: Talking Heads, arXiv:2406.09519, Sec. 4 (removing components, setting the scalar).   Oracle: W_O edited
explicitly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from steering.errors import SpecError
from steering.methods.base import checked_number
from steering.methods.planned import PlanIntervention, without_first
from steering.plan import MAX_RANK, ChannelsPlan, is_orthonormal
from steering.program import Term
from steering.registry import Bench, register
from steering.types import Route, Site


@register
@dataclass(frozen=True, kw_only=True)
class Channels(PlanIntervention):
    """Remove, scale or hold components that later heads read."""

    plan_kind: ClassVar[str] = ChannelsPlan.kind

    type: Literal["channels"] = "channels"
    channels: int | tuple[int, ...] | None = None
    """The first so many of the plan's channels, or the numbers of some of them, counted from 0; null means those that
    lie above all random directions, at least the first."""
    scale: float | None = None
    """γ: 0 removes the components, 2 doubles them, −1 inverts them. Null means 0, where there is no `value`."""
    value: float | None = None
    """β: hold the scalar of each component at this value instead, in the units of the attention's output."""
    control: bool = False
    """Use a random component of a random head of the same block for each: what a claim has to be compared with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale is not None:
            checked_number("scale", self.scale, least=-100.0, most=100.0)
        if self.value is not None:
            checked_number("value", self.value)
            if self.scale is not None:
                raise SpecError("value", expected="either `scale` or `value`", got=self.value)
        if self.scale == 1:
            raise SpecError("scale", expected="a scale other than 1", got=self.scale)

    def compile(self, bench: Bench) -> Term:
        """One law at each block's attention, of as many channels as components are edited there."""
        plan = bench.plan(self.plan, ChannelsPlan)
        layers, by_layer = self.chosen_layers(plan.layers, bench.depth), self._places(plan)
        laws = {}
        for layer in layers:
            rows = list(by_layer.get(layer, {}).values())
            if not rows:
                continue
            if len(rows) > MAX_RANK:
                raise SpecError("channels", expected=f"at most {MAX_RANK} components of one block", got=len(rows))
            heads = plan.control_head if self.control else plan.source_head
            own_Rd = (plan.control_probe if self.control else plan.probe)[rows]
            gain_RD = (plan.control_direction if self.control else plan.direction)[rows]
            probe_RHd = own_Rd.new_zeros(len(rows), plan.heads, plan.head_width)
            probe_RHd[range(len(rows)), [heads[row] for row in rows]] = own_Rd
            laws[Route(Site("attn_act", layer), Site("attn_out", layer))] = self.law(
                probe_RHd.flatten(1),
                torch.full_like(own_Rd[:, 0], self.value or 0.0),
                gain_RD,
                share=1.0 if self.value is not None else 1.0 - (self.scale or 0.0),
                orthonormal=is_orthonormal(gain_RD),
            )
        if not laws:
            raise SpecError("layers", expected=f"layers with channels of plan {self.plan!r} that are chosen")
        return self.planned_term("channels", laws, without_first(self.apply))

    def _places(self, plan: ChannelsPlan) -> dict[int, dict[tuple[int, int], int]]:
        """Rows of the plan by block and then by head and component, each component once. Raises SpecError."""
        n = len(plan.source_layer)
        chosen = self.channels
        if chosen is None:
            chosen = max(1, plan.above)
        rows = range(chosen) if isinstance(chosen, int) else sorted(set(chosen))
        if isinstance(chosen, bool) or not rows or not all(0 <= row < n for row in (rows[0], rows[-1])):
            expected = f"1 to {n} channels, or numbers in 0..{n - 1}, which plan {self.plan!r} has"
            raise SpecError("channels", expected=expected, got=self.channels)
        if self.control:
            heads, components = plan.control_head, plan.control_component
        else:
            heads, components = plan.source_head, plan.component
        found: dict[int, dict[tuple[int, int], int]] = {}
        for row in rows:
            found.setdefault(plan.source_layer[row], {}).setdefault((heads[row], components[row]), row)
        return found
