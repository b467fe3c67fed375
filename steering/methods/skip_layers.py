"""Skip layers: leave out the attentions and MLPs that hardly turn the residual stream, for a whole request.

    h ← h + a  becomes  h ← h      a what an attention or an MLP adds, its norms and biases included

The modules come from a plan's drop list (so many of each, of both together, or whole blocks), or are named one by one.
They are out at every token of a request, prompt and all: the request never reads the keys of an attention that it
skips, so its cache stays right, and where all requests of a step skip a module the engine does not compute it.
For the same reason there is no part of it, no condition and no bound: strength is 0 or 1.
Shapes: one mask of zeros (D,) a module.   Cost: none; what is skipped is saved where all requests of a step skip it.
Source: LLM-Drop, arXiv:2406.15786; whole blocks after ShortGPT, arXiv:2403.03853.   Oracle: the model with the modules
replaced by zeros.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from steering.edit import Mask
from steering.errors import SpecError
from steering.methods.base import Applied, checked_layers
from steering.methods.planned import shares
from steering.plan import LayersPlan
from steering.plan.layers import Module
from steering.program import Scope, Term
from steering.registry import Bench, register
from steering.types import Tap, edit_at

ALWAYS = Scope("all", "all")
OUT: dict[Module, Tap] = {"attention": "attn_out", "mlp": "mlp_out"}
"""The tap of what a module gives to the stream."""


@register
@dataclass(frozen=True, kw_only=True)
class SkipLayers(Applied):
    """Leave out attentions and MLPs for the whole request."""

    plan_kind: ClassVar[str] = LayersPlan.kind

    type: Literal["skip_layers"] = "skip_layers"
    plan: str | None = None
    """Name of a plan of kind `layers`, from whose lists `attention`, `mlp`, `joint` and `blocks` take the first."""
    attention: int | None = None
    """How many attentions to skip, first those of the plan's list."""
    mlp: int | None = None
    """How many MLPs to skip."""
    joint: int | None = None
    """How many modules of both kinds to skip, those of the highest scores."""
    blocks: int | None = None
    """How many whole blocks to skip, those of the least influence."""
    attn_layers: tuple[int, ...] = ()
    """Blocks whose attention is skipped, beside those that the plan chooses."""
    mlp_layers: tuple[int, ...] = ()
    """Blocks whose MLP is skipped, beside those that the plan chooses."""
    control: bool = False
    """Take the plan's random order instead of the scored one: what a claim has to be compared with."""
    layers: tuple[int, ...] | None = field(
        default=None,
        metadata={"description": "Blocks of which a plan's lists may take modules, counted from 0; null means all."},
    )
    apply: Scope = field(
        default=ALWAYS, metadata={"description": "All of the prompt and of the generation; nothing else is possible."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strength not in (0, 1):
            raise SpecError("strength", expected="0 or 1: a layer is skipped or it is not", got=self.strength)
        for name, usual in (("apply", ALWAYS), ("when", None), ("max_effort", None)):
            if getattr(self, name) != usual:
                raise SpecError(
                    name,
                    expected="what it is when it is left out",
                    got=getattr(self, name),
                    advice="layers are skipped for the whole life of a request, whose cache lacks them",
                )
        counts = {name: getattr(self, name) for name in ("attention", "mlp", "joint", "blocks")}
        for name, count in counts.items():
            if count is not None and (type(count) is not int or count < 0):
                raise SpecError(name, expected="a whole number >= 0, or null", got=count)
            if count is not None and self.plan is None:
                raise SpecError("plan", expected=f"the plan that {name} counts in", got=None)
        if self.plan is None and not (self.attn_layers or self.mlp_layers):
            raise SpecError("plan", expected="a plan, or attn_layers or mlp_layers", advice="nothing would be skipped")
        if self.plan is not None and not any(counts.values()):
            raise SpecError(
                "attention", expected="how many modules to skip, here or in mlp, joint or blocks", got=self.attention
            )
        if self.plan is None and (self.control or self.layers is not None):
            raise SpecError("plan", expected="a plan, which control and layers are about", got=None)

    def compile(self, bench: Bench) -> Term:
        """One mask of zeros for each module."""
        chosen: set[tuple[Module, int]] = set()
        for name, layers, module in (
            ("attn_layers", self.attn_layers, "attention"),
            ("mlp_layers", self.mlp_layers, "mlp"),
        ):
            for layer in layers:
                if not 0 <= layer < bench.depth:
                    raise SpecError(name, expected=f"layers in 0..{bench.depth - 1}", got=layer)
                chosen.add((module, layer))  # type: ignore[arg-type]
        if self.plan is not None:
            chosen |= self._planned(bench.plan(self.plan, LayersPlan))
        gone = Mask.of(torch.zeros(bench.width), strength=self.strength)
        laws = {edit_at("mask", OUT[module], layer): gone for module, layer in sorted(chosen)}
        label = self.plan or "skip_layers"
        return Term(label, "skip_layers", laws, ALWAYS, "fraction", gauges=shares(laws), is_whole=True)

    def _planned(self, plan: LayersPlan) -> set[tuple[Module, int]]:
        """What the plan's lists say. Raises SpecError for more modules than they have among `layers`."""
        allowed = range(plan.depth) if self.layers is None else checked_layers(self.layers, plan.depth)
        lists: dict[str, list[list[tuple[Module, int]]]] = {
            "attention": [[("attention", layer)] for layer in plan.ordered("attention", control=self.control)],
            "mlp": [[("mlp", layer)] for layer in plan.ordered("mlp", control=self.control)],
            "joint": [[found] for found in plan.joint(control=self.control)],
            "blocks": [[("attention", layer), ("mlp", layer)] for layer in plan.blocks(control=self.control)],
        }
        chosen: set[tuple[Module, int]] = set()
        for name, entries in lists.items():
            found = [modules for modules in entries if modules[0][1] in allowed]
            count = getattr(self, name) or 0
            if count > len(found):
                raise SpecError(name, expected=f"at most {len(found)}, which plan {self.plan!r} has there", got=count)
            chosen.update(module for modules in found[:count] for module in modules)
        return chosen
