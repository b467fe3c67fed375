"""Sae: drive features of a sparse autoencoder to a value, add them, or take them away; the rest of the state stays.

    clamp    h' = h + a Σ_f (c_f − z_f(h)) s d_f         c_f = value · a_max_f, or value itself in `absolute` units
    add      h' = h + a Σ_f c_f s d_f
    ablate   clamp to c = 0

z_f(h) is the feature's activation, d_f its decoder row, s the autoencoder's scale. A clamp does not replace h by its
reconstruction: what the autoencoder misses is kept. It is one law: the probe is the encoder's row over s, rectified at
the knee θ − b, and the setpoint c − b (`steering.plan.sae`). Where features' decoder rows overlap with other encoder
rows, a clamp moves those too; the same feature encoded again is c only as far as w_f·d_f = 1, and where it did not fire
it still lacks what it lacked.
Position 0 is left out of `apply.prompt: all`. Reported is the first feature's activation before the edit.
Shapes: R features.   Cost: 2·2·R·D multiply-adds per token and layer.   `max_effort` is shared out over the features.
Source: Templeton et al., Scaling Monosemanticity (2024), the clamp; AxBench, arXiv:2501.17148, the addition.
Oracle: encode, edit the activations, decode the difference.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from steering.errors import SpecError
from steering.law import Law
from steering.methods.base import LARGEST, checked_number
from steering.methods.planned import PlanIntervention, without_first
from steering.plan import MAX_RANK, Autoencoder, SaePlan
from steering.program import Term
from steering.registry import Bench, register
from steering.types import Route, at


@register
@dataclass(frozen=True, kw_only=True)
class Sae(PlanIntervention):
    """Clamp, add or ablate features of a sparse autoencoder."""

    plan_kind: ClassVar[str] = SaePlan.kind

    type: Literal["sae"] = "sae"
    mode: Literal["clamp", "add", "ablate"] = "clamp"
    """`clamp` the activation to a value, `add` that much of it whatever it is, or `ablate` it."""
    features: tuple[int, ...] | None = None
    """Numbers of the features. Null means the first of the plan by selectivity, as many as `first` says."""
    first: int | None = None
    """How many of the most selective features are used where none are numbered; null means 1."""
    value: float = 1.0
    """The value, in `units`; 1 is a feature's largest activation seen."""
    units: Literal["a_max", "absolute"] = "a_max"
    """`a_max`: in a feature's own largest activations; `absolute`: in activation."""
    control: bool = False
    """Use the plan's random features, as many, at the values of the chosen ones: what a claim is compared with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in ("clamp", "add", "ablate"):
            raise SpecError("mode", expected="clamp, add or ablate", got=self.mode)
        if self.units not in ("a_max", "absolute"):
            raise SpecError("units", expected="a_max or absolute", got=self.units)
        checked_number("value", self.value)
        if self.mode == "add" and self.value == 0:
            raise SpecError("value", expected="a value other than 0, for an addition", got=self.value)
        if self.features is not None:
            if self.first is not None:
                raise SpecError("first", expected="null where `features` names them", got=self.first)
            if not 1 <= len(set(self.features)) == len(self.features) < MAX_RANK:
                expected = f"1 to {MAX_RANK - 1} features, each once"
                raise SpecError("features", expected=expected, got=list(self.features))
        elif self.first is not None and (isinstance(self.first, bool) or not 1 <= self.first < MAX_RANK):
            raise SpecError("first", expected=f"1 to {MAX_RANK - 1}, or null", got=self.first)

    def compile(self, bench: Bench) -> Term:
        """One law at the autoencoder's site of each chosen block, of as many channels as features."""
        plan = bench.plan(self.plan, SaePlan)
        layers = self.chosen_layers(plan.layers, bench.depth)
        if self.features is not None and len(layers) > 1:
            expected = f"one layer of {list(plan.layers)}, since a feature's number means another one at each"
            raise SpecError("layers", expected=expected, got=None if self.layers is None else list(layers))
        laws: dict[Route, Law] = {}
        gauges: dict[Route, tuple[float, float]] = {}
        value_R = torch.zeros(1)
        for layer in layers:
            row, route = plan.layers.index(layer), at(plan.tap, layer)
            ae = plan.autoencoder(row)
            chosen = self._chosen(plan, row)
            value_R = self._values(plan, row, chosen)
            used = self._control(plan, row, chosen) if self.control else chosen
            laws[route] = self._law(ae, used, value_R)
            gauges[route] = (-float(ae.encoder_bias[used[0]]), 1.0)
        target = float(value_R[0]) if len(laws) == 1 and self.mode != "add" else None
        return self.planned_term("sae", laws, without_first(self.apply), units="absolute", target=target, gauges=gauges)

    def _law(self, ae: Autoencoder, features: Tensor, value_R: Tensor) -> Law:
        """The law of these features. An addition is preceded by a channel that only measures the first of them."""
        probe_RD, bias_R, knee_R = ae.probes(features)
        write_RD = ae.writes(features)
        if self.mode == "add":
            law = self.law(torch.zeros_like(probe_RD), value_R, write_RD, orthonormal=False)
            probe_1D = probe_RD[:1]
            meter = Law.of(probe_1D, 0.0, torch.zeros_like(probe_1D), strength=self.strength)
            return replace(meter, knee=knee_R[:1], floor=-bias_R[:1]) + law
        law = self.law(probe_RD, value_R - bias_R, write_RD, orthonormal=False)
        return replace(law, knee=knee_R, floor=-bias_R)

    def _chosen(self, plan: SaePlan, row: int) -> Tensor:
        """Numbers of the features at one block. Raises SpecError for those that the plan does not have."""
        if self.features is not None:
            for feature in self.features:
                if not 0 <= feature < plan.features:
                    raise SpecError("features", expected=f"features in 0..{plan.features - 1}", got=feature)
            return torch.tensor(self.features)
        n, order = self.first or 1, plan.order(row)
        if plan.measured != "classes":
            expected = f"numbers of features, for plan {self.plan!r} does not know which class each tells"
            raise SpecError("features", expected=expected)
        if n > len(order):
            told = f"at most {len(order)}, which the positive class has more of at block {plan.layers[row]}"
            raise SpecError("first", expected=told, got=n)
        return order[:n]

    def _values(self, plan: SaePlan, row: int, features: Tensor) -> Tensor:
        """c (R,). Raises SpecError where the plan has seen no activation of a feature, or a value leaves float32."""
        peak_R = plan.peak[row, features]
        if self.mode == "ablate" or self.units == "absolute":
            return torch.full_like(peak_R, 0.0 if self.mode == "ablate" else self.value)
        if plan.measured == "nothing":
            expected = f"absolute, for plan {self.plan!r} does not know how large activations become"
            raise SpecError("units", expected=expected, got=self.units)
        if not bool((peak_R > 0).all()):
            silent = int(features[int((peak_R == 0).nonzero()[0])])
            raise SpecError("features", expected="features that were seen to fire, or units: absolute", got=silent)
        value_R = self.value * peak_R
        if not bool((value_R.abs() <= LARGEST).all()):
            raise SpecError("value", expected="a value whose target is a finite float32", got=self.value)
        return value_R

    def _control(self, plan: SaePlan, row: int, features: Tensor) -> Tensor:
        """As many random features, none of the chosen ones. Raises SpecError where the plan has not so many."""
        control = plan.control[row].long()
        others = control[~torch.isin(control, features)]
        if len(others) < len(features):
            expected = f"at most {len(others)} features, for the control of plan {self.plan!r} has no more others"
            raise SpecError("control", expected=expected)
        return others[: len(features)]
