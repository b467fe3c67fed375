"""ReFT: a trained low-rank edit of a block's output, LoReFT or DiReFT.

    LoReFT   h' = h + a Rᵀ (W h + b − R h)           rows of R orthonormal; at a = 1:  R h' = W h + b
    DiReFT   h' = h + a Rᵀ (W h + b)

Both are laws: the probe is R − W, or −W, the setpoint b, the gain R. The edit acts at the prompt positions that it was
trained on, the first f and last l of the prompt (`f7+l7` is usual), and at no generated token; with `positions: apply`
the request says where.
Shapes: R, W (r, D), b (r,).   Cost: 2·2·r·D multiply-adds per token and layer.
Source: ReFT, arXiv:2404.03592, Sec. 3.2; files as pyreft writes them (`steering.formats.pyreft`).
Oracle: the sums formed explicitly.
Of the published code we leave: f and l cut to half of a short prompt, whose middle token is then not edited; positions
that count the padding; the sum formed in bfloat16. Here a position is edited once, whatever lists it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from steering.errors import SpecError
from steering.methods.planned import PlanIntervention
from steering.plan import ReftPlan
from steering.program import Positions, Scope, Term
from steering.registry import Bench, register
from steering.types import at


@register
@dataclass(frozen=True, kw_only=True)
class Reft(PlanIntervention):
    """Apply a trained low-rank edit, LoReFT or DiReFT, to blocks' outputs."""

    plan_kind: ClassVar[str] = ReftPlan.kind

    type: Literal["reft"] = "reft"
    positions: Literal["trained", "apply"] = "trained"
    """`trained`: the prompt positions of the training, nothing in generation; `apply`: those that `apply` selects."""

    apply: Scope | None = field(  # type: ignore[assignment]
        default=None, metadata={"description": "Where to act with `positions: apply`; null else."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions not in ("trained", "apply"):
            raise SpecError("positions", expected="trained or apply", got=self.positions)
        if self.positions == "trained" and self.apply is not None:
            raise SpecError("positions", expected="apply, since `apply` is given", got=self.positions)

    def compile(self, bench: Bench) -> Term:
        """One rank-r law at each chosen block's output."""
        plan = bench.plan(self.plan, ReftPlan)
        laws = {}
        for layer in self.chosen_layers(plan.layers, bench.depth):
            row = plan.layers.index(layer)
            R_RD, W_RD = plan.rotation[row], plan.weight[row]
            probe_RD = R_RD - W_RD if plan.form == "loreft" else -W_RD
            laws[at("resid_post", layer)] = self.law(probe_RD, plan.bias[row], R_RD, orthonormal=plan.is_rotation)
        return self.planned_term("reft", laws, self._scope(plan))

    def _scope(self, plan: ReftPlan) -> Scope:
        """Where it acts. Raises SpecError where the plan does not know its positions and the request does not say."""
        if self.positions == "apply":
            return self.apply or Scope()
        if not plan.first + plan.last:
            expected = f"apply, for plan {self.plan!r} does not tell its trained positions"
            raise SpecError("positions", expected=expected, got=self.positions)
        return Scope(Positions((*range(plan.first), *range(-plan.last, 0))), "none")
