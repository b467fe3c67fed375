"""Attention heads: shift them along the direction that tells the classes apart (ITI), or scale, fix or hold them.

    shift    x_h ← x_h + α σ_h θ_h                   ITI: α = 15, the 48 heads of the best accuracy among 1,024
    clamp    x_h ← x_h + (r_h − θ_h·x_h) θ_h         r_h = θ_h·μ₋ + λ θ_h·(μ₊ − μ₋): the projection is held at λ
    scale    x_h ← factor · x_h
    zero     x_h ← 0
    mean     x_h ← its mean

x_h (d,) is head h's part of what the attention's last map reads. Clamp is the closed loop of shift: where a head is
already at λ it adds nothing. Heads of one block lie side by side, so their directions are orthonormal and one law of as
many channels holds them all. Published, ITI acts at every token of the answer; its bias form at every token.
Shapes: θ (K, d) in a block's H·d columns.   Cost: 2·K·H·d multiply-adds per token and block; 2·H·d for a mask.
`max_effort` of `shift` and `clamp` is shared out over a block's heads.
Source: ITI, arXiv:2306.03341, Sec. 3 (shift); the clamp is ours.   Oracle: α σ θ added to the last map's bias.
Of the published code we leave: a σ of other rows than the direction's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from steering.edit import Acting, Mask
from steering.errors import SpecError
from steering.methods.base import LARGEST, checked_number
from steering.methods.planned import PlanIntervention, without_first
from steering.plan.heads import HeadsPlan
from steering.program import Term
from steering.registry import Bench, register
from steering.types import Route, at, edit_at

USUAL = (48, 1024)
"""K of the publication, and of how many heads."""


def usual(n_heads: int) -> int:
    """How many of `n_heads` are chosen where a request does not say: as published, or the same share of fewer."""
    return max(1, min(USUAL[0], round(n_heads * USUAL[0] / USUAL[1])))


_MODES = ("shift", "clamp", "scale", "zero", "mean")


@register
@dataclass(frozen=True, kw_only=True)
class Heads(PlanIntervention):
    """Shift, hold, scale, silence or fix attention heads that a plan has ranked."""

    plan_kind: ClassVar[str] = HeadsPlan.kind

    type: Literal["heads"] = "heads"
    mode: Literal["shift", "clamp", "scale", "zero", "mean"] = "shift"
    """`shift` by `alpha` deviations (ITI), `clamp` the projection at `setpoint`, `scale` by `factor`, `zero`, or the
    head's `mean` in its place."""
    heads: int | tuple[tuple[int, int], ...] | None = None
    """The first so many of the plan's heads, best first, or a list of [layer, head]; null means the published share, 48
    of 1,024, and at most 48."""
    alpha: float | None = None
    """α of `shift`, in standard deviations of a head's projection; null means 15, the published value."""
    setpoint: float | None = None
    """λ of `clamp`: 0 is the negative examples' mean, 1 the positive ones'."""
    factor: float | None = None
    """Of `scale`: what a head is multiplied by."""
    control: bool = False
    """Use as many random heads instead of the chosen ones: what a claim has to be compared with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in _MODES:
            raise SpecError("mode", expected=f"one of {', '.join(_MODES)}", got=self.mode)
        for name, mode in (("alpha", "shift"), ("setpoint", "clamp"), ("factor", "scale")):
            value = getattr(self, name)
            if value is not None:
                checked_number(name, value)
                if self.mode != mode:
                    raise SpecError(name, expected=f"null: only mode {mode!r} has it", got=value)
            elif self.mode == mode and name != "alpha":
                raise SpecError(name, expected=f"a number, for mode {mode!r}")
        if self.alpha == 0 or self.factor == 1:
            name = "alpha" if self.alpha == 0 else "factor"
            raise SpecError(name, expected="a number that changes something", got=getattr(self, name))
        if isinstance(self.heads, bool) or (isinstance(self.heads, int) and self.heads < 1) or self.heads == ():
            raise SpecError("heads", expected="a whole number >= 1, a list of [layer, head], or null", got=self.heads)
        if isinstance(self.heads, tuple) and self.layers is not None:
            raise SpecError("layers", expected="null, since `heads` names the layers", got=list(self.layers))

    def compile(self, bench: Bench) -> Term:
        """One law, or one mask, at the heads of each block that has some of those chosen."""
        plan = bench.plan(self.plan, HeadsPlan)
        layers = self.chosen_layers(plan.layers, bench.depth)
        laws: dict[Route, Acting] = {}
        gauges: dict[Route, tuple[float, float]] = {}
        by_row: dict[int, list[int]] = {}
        for row, head in self._chosen(plan, layers):
            by_row.setdefault(row, []).append(head)
        for row, heads in sorted(by_row.items()):
            layer = plan.layers[row]
            if self.mode not in ("shift", "clamp"):
                laws[edit_at("mask", "attn_act", layer)] = self._mask(plan, row, heads)
                continue
            # Heads without a direction have nothing to be moved along.
            moved = [head for head in heads if bool(plan.direction[row, head].any())]
            if moved:
                laws[at("attn_act", layer)] = self._moved(plan, row, moved)
                origin, mean = float(plan.negative[row, moved[0]]), float(plan.positive[row, moved[0]])
                if self.mode == "clamp" and mean > origin:
                    gauges[at("attn_act", layer)] = (origin, mean - origin)
        if not laws:
            raise SpecError("heads", expected=f"heads in which plan {self.plan!r} found a direction", got=self.heads)
        return self.planned_term("heads", laws, without_first(self.apply), target=self.setpoint, gauges=gauges or None)

    def _chosen(self, plan: HeadsPlan, layers: tuple[int, ...]) -> list[tuple[int, int]]:
        """(row of the plan, head) of the heads that are used, best first. Raises SpecError for one it does not have."""
        n_heads = plan.accuracy.shape[1]

        def of(order: Tensor) -> list[tuple[int, int]]:
            places = (divmod(int(place), n_heads) for place in order.tolist())
            return [(row, head) for row, head in places if plan.layers[row] in layers]

        ranked = of(plan.order)
        if isinstance(self.heads, tuple):
            chosen = []
            for layer, head in dict.fromkeys(map(tuple, self.heads)):
                if layer not in plan.layers or not 0 <= head < n_heads:
                    expected = f"[layer, head] with a layer of {list(plan.layers)} and a head in 0..{n_heads - 1}"
                    raise SpecError("heads", expected=expected, got=[layer, head])
                chosen.append((plan.layers.index(layer), head))
        else:
            count = usual(len(ranked)) if self.heads is None else self.heads
            if count > len(ranked):
                expected = f"at most {len(ranked)}, which plan {self.plan!r} has in these layers"
                raise SpecError("heads", expected=expected, got=count)
            chosen = ranked[:count]
        if not self.control:
            return chosen
        shuffled = of(plan.control)
        others = [place for place in shuffled if place not in set(chosen)]
        if not others:
            raise SpecError("control", expected="fewer heads than the plan has, so that others can be drawn", got=True)
        return (others if len(others) >= len(chosen) else shuffled)[: len(chosen)]

    def _mask(self, plan: HeadsPlan, row: int, heads: list[int]) -> Mask:
        """The heads of one block scaled, silenced, or at their mean."""
        scale_HD, shift_HD = torch.ones_like(plan.mean[row]), torch.zeros_like(plan.mean[row])
        scale_HD[heads] = self.factor if self.factor is not None else 0.0
        if self.mode == "mean":
            shift_HD[heads] = plan.mean[row, heads]
        return Mask.of(scale_HD.flatten(), shift_HD.flatten(), strength=self.strength, cap=self.cap)

    def _moved(self, plan: HeadsPlan, row: int, heads: list[int]) -> Acting:
        """The heads of one block shifted or held: a channel each, in the order of the plan."""
        _, H, d = plan.direction.shape
        theta_RHD = plan.direction.new_zeros(len(heads), H, d)
        for channel, head in enumerate(heads):
            theta_RHD[channel, head] = plan.direction[row, head]
        theta_RE = theta_RHD.flatten(1)
        if self.mode == "shift":
            alpha = 15.0 if self.alpha is None else self.alpha
            target_R, probe_RE = alpha * plan.deviation[row, heads], torch.zeros_like(theta_RE)
        else:
            low_R, high_R = plan.negative[row, heads], plan.positive[row, heads]
            target_R, probe_RE = low_R + (self.setpoint or 0.0) * (high_R - low_R), theta_RE
        if not bool((target_R.abs() <= LARGEST).all()):
            name = "alpha" if self.mode == "shift" else "setpoint"
            raise SpecError(name, expected="a number whose target is a finite float32", got=getattr(self, name))
        return self.law(probe_RE, target_R, theta_RE)
