"""Sparsity: leave out the coordinates of linear maps' inputs that count least, by threshold or top-k.

    y = W(m ⊙ x) + W V Vᵀ ((1 − m) ⊙ x)      m_i = 1 where |x_i| w_i > t  (threshold)   or among the k largest (top_k)

w = 1 is TEAL, w_i = ‖W_:,i‖ WINA; `mlp_act` alone with top_k is Lazy Neuron's mask and, with thresholds of one tail
error, Sparsing Law's; V, where the plan has a rest, is R-Sparse. The receipt reports the share of coordinates that the
mask left out, mean over sites, beside the plan's.

By default prompts stay dense and decoding is sparse: a mask saves weight traffic where one token at a time is computed,
and the published figures too leave a beginning dense (half of the sequence in TEAL, 1 % in WINA). `apply` says else;
position 0 stays dense with `prompt: all`. Beside steering take `top_k`: a vector shifts |x|, and with it what passes a
threshold.
Shapes: S sites of width E a block, rest (K, E).   Cost: one comparison a coordinate, or a selection; 2·2·K·E for a
rest. What a mask leaves out is saved only by a kernel that skips those weights, and only where few tokens share a step.
Source: TEAL, arXiv:2408.14690; WINA, arXiv:2505.19427; R-Sparse, arXiv:2504.19449; Sparsing Law, arXiv:2411.02335; Lazy
Neuron, arXiv:2210.06313.   Oracle: the modules computed by hand on the masked input.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from steering.errors import SpecError
from steering.methods.base import checked_number
from steering.methods.planned import PlanIntervention, without_first
from steering.plan import SparsityPlan
from steering.plan.sparsity import SPARSE_TAPS, Rule, SparseTap
from steering.program import Scope, Term
from steering.registry import Bench, register
from steering.types import edit_at


@register
@dataclass(frozen=True, kw_only=True)
class Sparsity(PlanIntervention):
    """Leave out what counts least at the inputs of linear maps."""

    plan_kind: ClassVar[str] = SparsityPlan.kind

    type: Literal["sparsity"] = "sparsity"
    sparsity: float | None = None
    """Share of the weights that need not be read, over all of the plan's blocks and sites; null means the level that
    the plan was made for."""
    rule: Rule | None = None
    """`threshold` or `top_k`; null means the plan's."""
    sites: tuple[SparseTap, ...] | None = None
    """Those of the plan's sites that become sparse; null means all."""
    control: bool = False
    """Leave out as many coordinates of each site at random, the same for every token: what a claim has to be compared
    with."""
    apply: Scope = field(
        default=Scope("none", "all"),
        metadata={"description": "Prompt positions and decode steps to act on; by default prompts stay dense."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strength not in (0, 1):
            raise SpecError("strength", expected="0 or 1: a coordinate is left out or it is not", got=self.strength)
        if self.max_effort is not None:
            raise SpecError("max_effort", expected="null: under a bound nothing would be left out", got=self.max_effort)
        if self.sparsity is not None:
            checked_number("sparsity", self.sparsity, least=1e-3, most=1.0)
        if self.rule not in (None, "threshold", "top_k"):
            raise SpecError("rule", expected="threshold, top_k or null", got=self.rule)
        if self.sites is not None and (not self.sites or any(tap not in SPARSE_TAPS for tap in self.sites)):
            raise SpecError("sites", expected=f"one or more of {', '.join(SPARSE_TAPS)}, or null", got=list(self.sites))

    def compile(self, bench: Bench) -> Term:
        """One edit at each chosen site of each chosen block."""
        plan = bench.plan(self.plan, SparsityPlan)
        layers = self.chosen_layers(plan.layers, bench.depth)
        for tap in self.sites or ():
            if tap not in plan.sites:
                raise SpecError(
                    "sites", expected=f"sites that plan {self.plan!r} has, {', '.join(plan.sites)}", got=tap
                )
        level = plan.target if self.sparsity is None else self.sparsity
        if level > plan.levels[-1]:
            expected = f"at most {plan.levels[-1]:g}, the last level that plan {self.plan!r} has"
            raise SpecError("sparsity", expected=expected, got=level)
        edits = plan.edits(level, rule=self.rule, control=self.control, strength=self.strength, cap=self.cap)
        laws = {
            edit_at(edit.form, site.tap, site.layer): edit
            for site, edit in edits.items()
            if site.layer in layers and (self.sites is None or site.tap in self.sites)
        }
        shares_nS = plan.at(level)[0]
        shares = [
            float(shares_nS[plan.layers.index(route.write.layer), plan.sites.index(route.write.tap)]) for route in laws
        ]
        term = self.planned_term(
            "sparsity",
            laws,
            without_first(self.apply),
            units="fraction",
            target=sum(shares) / max(len(shares), 1),
            gauges=dict.fromkeys(laws, (0.0, 1.0)),
        )
        return replace(term, is_whole=True)
