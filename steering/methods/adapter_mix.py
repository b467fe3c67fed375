"""Adapter mix: a task vector, as a LoRA adapter, mixed in with one coefficient for all of it or for each linear map.

    y' = y + a α_m s B A x,      y = W_m x the output of linear map m         θ = θ_0 + Σ_i α_i τ_i

Each map's update is a law from its input to its output: probe A, setpoint 0, gain −s B, so that (0 − A x)(−s B) = s B A
x. α_m below 0 forgets; one for each tensor is aTLAS' form. Several adapters are several interventions and superpose,
which is task arithmetic; the coefficients are knobs, so other ones need no other slot.

An adapter is a part of the weights, so it acts at every token: `apply` is all of the prompt and of the generation
unless it is given. The keys and values of those tokens are then other ones than the model's own, for as long as the
request runs, whatever other interventions do. With a narrower `apply` later tokens read keys of both kinds, which no
merged model has. `max_effort` is shared out over the r channels of each map, relative to its input.
Shapes: A (r, in), B (out, r), per map.   Cost: 2·r·(in + out) multiply-adds per token and map.
Source: task arithmetic, arXiv:2212.04089, Sec. 2; aTLAS, arXiv:2407.02880; LoRA, arXiv:2106.09685; files as PEFT
writes them (`steering.formats.peft`).   Oracle: the logits of the merged weights W + Σ α s B A.
Of the published code we leave: the copy of all weights for each mix; the coefficients learned on a task, which is
training and gives numbers that can be sent here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from steering.errors import SpecError
from steering.methods.base import checked_number
from steering.methods.planned import PlanIntervention
from steering.plan import AdapterPlan
from steering.plan.adapter import SITES, TARGETS, place
from steering.program import Scope, Term
from steering.registry import Bench, register
from steering.types import Route, Site

PARTS: Mapping[str, tuple[str, ...]] = {"attn": TARGETS[:4], "mlp": TARGETS[4:], **{name: (name,) for name in TARGETS}}
"""What a key of `weights` may name of a block."""
KEY = re.compile(
    r"\*|(?:layers\.(?P<first>\d{1,4})(?:-(?P<last>\d{1,4}))?)?"
    rf"(?:(?:^|(?<=\d)\.)(?P<part>{'|'.join(PARTS)}))?"
)


@register
@dataclass(frozen=True, kw_only=True)
class AdapterMix(PlanIntervention):
    """Mix in a LoRA adapter, with one coefficient or one for each part of the model."""

    plan_kind: ClassVar[str] = AdapterPlan.kind

    type: Literal["adapter_mix"] = "adapter_mix"
    weights: float | Mapping[str, float] = 1.0
    """Coefficient α: 1 is the adapter as trained, below 0 its opposite. Or one for each part: keys `*`, `layers.3`,
    `layers.10-20` (both ends count), `mlp`, `attn`, `q` … `down`, and both, `layers.10-20.mlp`. The key that names the
    fewest linear maps decides; what no key names is left alone."""
    apply: Scope = field(
        default=Scope("all", "all"),
        metadata={"description": "Prompt positions and decode steps to act on: all, as merged weights would."},
    )
    spare_massive: bool = field(
        default=False,
        metadata={"description": "Leave massive activations alone; the adapter is then not the trained one."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.weights, Mapping):
            checked_number("weights", self.weights)
            return
        for key, value in self.weights.items():
            checked_number("weights", value)
            if not key or not KEY.fullmatch(key):
                raise SpecError("weights", expected="keys such as *, layers.10-20.mlp, layers.3.q or down", got=key)

    def compile(self, bench: Bench) -> Term:
        """One law of rank r from the input to the output of each linear map whose coefficient is not 0."""
        plan = bench.plan(self.plan, AdapterPlan)
        layers, alpha = self.chosen_layers(plan.layers, bench.depth), self.coefficients(plan)
        laws = {}
        for name, (layer, target, A_RD, B_RE) in zip(plan.modules, plan.factors(), strict=True):
            if layer in layers and alpha.get(name, 0.0) != 0:
                read, write = SITES[target]
                law = self.law(A_RD, A_RD.new_zeros(len(A_RD)), -B_RE, share=alpha[name], orthonormal=False)
                laws[Route(Site(read, layer), Site(write, layer))] = law
        if not laws:
            raise SpecError(
                "weights",
                expected="a coefficient other than 0 in the chosen layers",
                advice="`strength` 0 leaves the model unsteered",
            )
        return self.planned_term("adapter_mix", laws)

    def coefficients(self, plan: AdapterPlan) -> dict[str, float]:
        """α by linear map of the plan. Raises SpecError for a key that names none of them, or two that disagree."""
        if not isinstance(self.weights, Mapping):
            return dict.fromkeys(plan.modules, self.weights)
        named = {key: [name for name in plan.modules if _names(key, name)] for key in self.weights}
        for key, names in named.items():
            if not names:
                expected = f"keys that name linear maps of plan {self.plan!r}, such as {plan.modules[0]}"
                raise SpecError("weights", expected=expected, got=key)
        found: dict[str, float] = {}
        for name in plan.modules:
            keys = [key for key, names in named.items() if name in names]
            fewest = min((len(named[key]) for key in keys), default=0)
            closest = [key for key in keys if len(named[key]) == fewest]
            values = {self.weights[key] for key in closest}
            if len(values) > 1:
                raise SpecError("weights", expected=f"one coefficient for {name}", got=closest)
            if values:
                found[name] = values.pop()
        return found


def _names(key: str, name: str) -> bool:
    """Whether a key of `weights` names a linear map of a plan."""
    layer, target = place(name)
    match = KEY.fullmatch(key)
    assert match is not None, "checked when the intervention was made"
    first, last, part = match["first"], match["last"] or match["first"], match["part"]
    return (first is None or int(first) <= layer <= int(last)) and (part is None or target in PARTS[part])
