"""What every worker says of itself before anything is steered: nothing is served unsteered by accident.

vLLM goes on without a plugin that did not load, and so would requests. So the front asks all workers who they are, and
lets no steered request through before all of them gave the right answer, the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steering.errors import PlantError, SteeringError
from steering.program import Program
from steering.types import Site
from steering.vllm.attachment import PROTOCOL

HELLO = "setpoint_hello"
"""The workers' method that answers."""
SAME = ("protocol", "refused", "runner", "backend", "depth", "width", "taps", "compiled", "tensor_parallel_size")
"""What all ranks must agree on."""


@dataclass(frozen=True, slots=True)
class Handshake:
    """What the workers of one engine are and can do.

    taps: the kinds of sites there are. is_native: whether vLLM's own modelling code runs. runner: its class.
    """

    taps: frozenset[str]
    depth: int
    width: int
    is_native: bool
    is_compiled: bool
    runner: str
    ranks: int

    @classmethod
    def shake(cls, call: Callable[[str], Sequence[Any]], width: int, depth: int) -> Handshake:
        """Ask all workers; `call` runs one of their methods on each. `width` and `depth` are the model's.

        Raises SteeringError, in one sentence, if one of them does not answer, cannot steer, or differs.
        """
        try:
            answers = call(HELLO)
        except Exception as error:
            raise SteeringError(
                "vLLM's workers do not have Setpoint in them: install setpoint in their environment, and do not leave "
                f"it out of VLLM_PLUGINS ({type(error).__name__})."
            ) from error
        if not answers or not all(isinstance(answer, Mapping) for answer in answers):
            raise SteeringError("vLLM's workers gave no answer to the handshake: nothing can be steered.")
        first = answers[0]
        for answer in answers:
            if answer.get("protocol") != PROTOCOL:
                raise SteeringError(
                    f"A worker speaks protocol {answer.get('protocol')!r}, expected {PROTOCOL}: install one version of "
                    "Setpoint throughout."
                )
            if answer.get("refused"):
                raise SteeringError(str(answer["refused"]))
            if any(answer.get(name) != first.get(name) for name in SAME):
                raise SteeringError("vLLM's workers differ from one another: nothing can be steered.")
        if len(answers) != first["tensor_parallel_size"]:
            raise SteeringError(f"{len(answers)} workers answered, expected {first['tensor_parallel_size']}.")
        if (first["width"], first["depth"]) != (width, depth):
            raise SteeringError(
                f"vLLM's model has width {first['width']} and {first['depth']} blocks, expected {width} and {depth}."
            )
        return cls(
            frozenset(first["taps"]),
            depth,
            width,
            first["backend"] == "native",
            bool(first["compiled"]),
            first["runner"],
            len(answers),
        )

    def check(self, program: Program) -> None:
        """Raises PlantError if a program asks for a site that these workers do not show."""
        for term in program.terms:
            sites = {site for route in term.laws for site in (route.read, route.write)}
            if term.gate is not None:
                sites.add(term.gate.site)
            for site in sorted(sites):
                if site.tap not in self.taps:
                    raise PlantError(f"{term.label} needs the site {site}, {self._remedy(site)}.", param="steering")

    def _remedy(self, site: Site) -> str:
        if self.is_native:
            return "which vLLM's own modelling code does not show: start with --model-impl transformers"
        if self.is_compiled:
            return f"which was not compiled in: start with SETPOINT_TAPS naming {site.tap}, or without --compile"
        return "which this model does not have on the vLLM engine"
