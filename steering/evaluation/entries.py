"""The rows of `setpoint eval --suite methods`: every intervention, on the ready concepts and plans."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from steering.methods import compile_program
from steering.program import Program
from steering.registry import REGISTRY, Bench

Task = Literal["raise", "lower", "keep"]


@dataclass(frozen=True)
class Entry:
    """One row: a method, what is swept, and the request's other fields.

    knob: the field that takes the strengths. has_control: whether the method has a `control` of its own; the others are
    compared with random directions and matrices (`steering.evaluation.catalogue.RandomBench`).
    """

    name: str
    type: str
    task: Task
    knob: str
    strengths: tuple[float, float, float]
    fields: Mapping[str, Any] = field(default_factory=dict)
    concept: str = "positive"
    has_control: bool = True

    def request(self, strength: float, is_control: bool = False) -> dict[str, Any]:
        """The intervention as a request has it."""
        cls: Any = REGISTRY[self.type]
        whole = cls.__dataclass_fields__[self.knob].type
        value = strength if "float" in str(whole) else int(strength)
        control = {"control": True} if is_control and self.has_control else {}
        return {"type": self.type, **self.fields, self.knob: value, **control}

    def program(self, strength: float, bench: Bench, is_control: bool = False) -> Program:
        """What the engine runs."""
        fields = {name: value for name, value in self.request(strength, is_control).items() if name != "type"}
        make: Callable[..., Any] = REGISTRY[self.type]
        return compile_program([make(**fields)], bench)


TONE = {"concept": "positive"}
ENTRIES: tuple[Entry, ...] = (
    Entry("lqr", "lqr", "raise", "setpoint", (1, 2, 3), TONE, has_control=False),
    Entry("pid", "pid", "raise", "setpoint", (1, 2, 3), TONE, has_control=False),
    Entry("add", "add", "raise", "strength", (1, 2, 4), TONE, has_control=False),
    Entry("clamp", "clamp", "raise", "setpoint", (1, 2, 3), TONE, has_control=False),
    Entry("angular", "angular", "raise", "strength", (0.1, 0.2, 0.4), TONE, has_control=False),
    Entry("linear_transport", "linear_transport", "raise", "strength", (0.5, 1, 1.5), {"plan": "tone-transport"}),
    Entry("reft", "reft", "raise", "strength", (0.5, 1, 1.5), {"plan": "tone-reft"}, has_control=False),
    Entry(
        "adapter_mix", "adapter_mix", "raise", "strength", (0.5, 1, 1.5), {"plan": "tone-adapter"}, has_control=False
    ),
    Entry("heads shift", "heads", "raise", "alpha", (1, 3, 8), {"plan": "tone-heads", "heads": 12}),
    Entry("heads clamp", "heads", "raise", "setpoint", (1, 2, 4), {"plan": "tone-heads", "heads": 12, "mode": "clamp"}),
    Entry("sae add", "sae", "raise", "value", (0.1, 0.2, 0.4), {"plan": "tone-sae", "mode": "add", "first": 4}),
    Entry("sae clamp", "sae", "raise", "value", (0.1, 0.2, 0.4), {"plan": "tone-sae", "first": 4}),
    Entry("act_add", "act_add", "raise", "strength", (1, 2, 4), {"plan": "tone-act-add", "layer": 3}),
    Entry("eigenshift shift", "eigenshift", "raise", "shift", (1, 2, 4), {"plan": "tone-eigenshift"}),
    Entry("language", "language", "raise", "strength", (0.5, 1, 2), {"plan": "spanish-language"}, "spanish"),
    Entry("ablate", "ablate", "lower", "strength", (0.5, 0.75, 1), TONE, has_control=False),
    Entry("eigenshift damp", "eigenshift", "lower", "alpha", (0.5, 0, -0.5), {"plan": "tone-eigenshift"}),
    Entry("neurons zero", "neurons", "lower", "units", (16, 64, 256), {"plan": "tone-neurons", "mode": "zero"}),
    Entry("neurons aura", "neurons", "lower", "strength", (0.5, 1, 1.5), {"plan": "tone-neurons"}),
    Entry("sae ablate", "sae", "lower", "first", (1, 4, 16), {"plan": "tone-sae", "mode": "ablate"}),
    Entry("heads zero", "heads", "lower", "heads", (2, 4, 8), {"plan": "tone-heads", "mode": "zero"}),
    Entry("subspace filter", "subspace", "lower", "strength", (0.5, 0.75, 1), {"plan": "principal", "mode": "filter"}),
    Entry("interaction", "interaction", "keep", "components", (1, 2, 4), {"plan": "interaction"}),
    Entry(
        "neurons sensitive",
        "neurons",
        "keep",
        "units",
        (2, 5, 10),
        {"plan": "sensitive-neurons", "mode": "zero", "sign": "both"},
    ),
    Entry("channels", "channels", "keep", "channels", (4, 16, 64), {"plan": "channels"}),
    Entry("sparsity", "sparsity", "keep", "sparsity", (0.2, 0.4, 0.6), {"plan": "sparse"}),
    Entry("sparsity top-k", "sparsity", "keep", "sparsity", (0.2, 0.4, 0.6), {"plan": "sparse", "rule": "top_k"}),
    Entry("skip_layers", "skip_layers", "keep", "joint", (1, 2, 3), {"plan": "depth"}),
)
"""The catalogue on the embedded model. `raise` and `lower` are of the tone, but for `language`."""
