"""ActAdd: add, at the first positions of the prompt, what one prompt has there that another has not.

    x[l, i] ← x[l, i] + a (h₊[l, i] − h₋[l, i])      i = 0 … P − 1 of the prompt, at the input of one block l

Added once, where the prompt is read; what is generated feels it through the attention's keys and values alone. The
coefficient a is `strength`, 5 in the publication's sentiment figures. Positions beyond the prompt's end select nothing:
of a prompt of fewer than P tokens as many positions are steered as it has, and one of a single token, where the
difference is zero or left out, is not steered at all. Position 0, which every later token attends to, is left out
unless `first`.
Shapes: (P, D), a channel for each position.   Cost: P·D multiply-adds a prompt, none a generated token.
Source: ActAdd, arXiv:2308.10248, Sec. 3 and Algorithm 1.   Oracle: the difference added to the state by a hook.
Of the published code we leave: a prompt shorter than the difference is an error there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from steering.errors import SpecError
from steering.law import Law
from steering.methods.planned import PlanIntervention
from steering.plan.act_add import ActAddPlan
from steering.program import Positions, Scope, Term
from steering.registry import Bench, register
from steering.types import at


@register
@dataclass(frozen=True, kw_only=True)
class ActAdd(PlanIntervention):
    """Add the difference of two prompts at the first positions of the prompt."""

    plan_kind: ClassVar[str] = ActAddPlan.kind

    type: Literal["act_add"] = "act_add"
    layer: int
    """The block at whose input it is added; the publication uses one at an eighth to a half of the depth."""
    first: bool = False
    """Whether position 0 is steered too, where the prompts differ there."""
    apply: Scope | None = field(  # type: ignore[assignment]
        default=None, metadata={"description": "Nothing else is possible than null: the first positions of the prompt."}
    )
    control: bool = False
    """Add random directions of the same lengths instead: what a claim has to be compared with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.layer) is not int:
            raise SpecError("layer", expected="a whole number", got=self.layer)
        if self.layers is not None:
            raise SpecError("layers", expected="null: act_add acts at `layer`", got=list(self.layers))
        if self.apply is not None:
            expected = "null: act_add acts at the first positions of the prompt"
            raise SpecError("apply", expected=expected, got=self.apply)

    def compile(self, bench: Bench) -> Term:
        """One law at the block's input, a channel and a scope for each position."""
        plan = bench.plan(self.plan, ActAddPlan)
        if self.layer not in plan.layers:
            raise SpecError("layer", expected=f"a layer of plan {self.plan!r}, {list(plan.layers)}", got=self.layer)
        row = plan.layers.index(self.layer)
        added_PD = (plan.control if self.control else plan.difference)[row]
        positions = [i for i in range(len(added_PD)) if bool(added_PD[i].any()) and (i > 0 or self.first)]
        if not positions:
            raise SpecError(
                "first", expected="true: the prompts of this plan differ at position 0 alone", got=self.first
            )
        gain_RD = added_PD[positions]
        # A token sees the one channel of its position, so the bound is each channel's own.
        law = Law.of(torch.zeros_like(gain_RD), 1.0, gain_RD, strength=self.strength, cap=self.cap)
        whole = Scope(Positions(tuple(positions)), "none")
        scopes = tuple(Scope(Positions((i,)), "none") for i in positions)
        return self.planned_term("act_add", {at("resid_pre", self.layer): law}, whole, scopes=scopes)
