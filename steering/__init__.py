"""Setpoint's library: activation steering as feedback control of a language model's residual stream.

Everything public is listed in `__all__` and imported on first use, so that `import steering` stays cheap: a command
line that only prints its help loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME: dict[str, str] = {
    "ArtifactCorrupt": "steering.errors",
    "ArtifactError": "steering.errors",
    "ArtifactNotFound": "steering.errors",
    "BankFull": "steering.errors",
    "CapacityError": "steering.errors",
    "ControlError": "steering.errors",
    "DimensionMismatch": "steering.errors",
    "Diverged": "steering.errors",
    "IllConditioned": "steering.errors",
    "PlantError": "steering.errors",
    "QueueFull": "steering.errors",
    "SpecError": "steering.errors",
    "StaleFingerprint": "steering.errors",
    "SteeringError": "steering.errors",
    "TeamLost": "steering.errors",
    "echo": "steering.errors",
    "Route": "steering.types",
    "Site": "steering.types",
    "Units": "steering.types",
    "When": "steering.condition",
    "Law": "steering.law",
    "Guard": "steering.program",
    "Positions": "steering.program",
    "Program": "steering.program",
    "Scope": "steering.program",
    "Term": "steering.program",
    "Window": "steering.program",
    "check_whole": "steering.program",
    "Bench": "steering.registry",
    "Intervention": "steering.registry",
    "REGISTRY": "steering.registry",
    "register": "steering.registry",
    "summary": "steering.registry",
    "Artifact": "steering.artifact",
    "Concept": "steering.concept",
    "Entry": "steering.store",
    "Shelf": "steering.store",
    "Store": "steering.store",
    "compile_program": "steering.methods",
    "Lqr": "steering.methods",
    "encoded": "steering.methods.inline",
    "Plant": "steering.plant.plant",
    "capture": "steering.plant.capture",
    "FitSettings": "steering.fit",
    "fit_concept": "steering.fit",
    "read_examples": "steering.fit",
    "AnyEngine": "steering.runtime",
    "Delta": "steering.runtime",
    "Engine": "steering.runtime",
    "EngineSettings": "steering.runtime",
    "Finished": "steering.runtime",
    "Grammar": "steering.runtime",
    "GrammarCompiler": "steering.runtime",
    "Receipt": "steering.runtime",
    "Request": "steering.runtime",
    "Sampling": "steering.runtime",
    "TokenLogprob": "steering.runtime",
    "VllmEngine": "steering.vllm.engine",
    "VllmSettings": "steering.vllm.launch",
    "Projections": "steering.probe",
    "trace_prompt": "steering.probe",
    "Check": "steering.doctor",
    "diagnose": "steering.doctor",
}
"""Where each public name is defined."""

__version__ = "0.1.0"

__all__ = [
    "REGISTRY",
    "AnyEngine",
    "Artifact",
    "ArtifactCorrupt",
    "ArtifactError",
    "ArtifactNotFound",
    "BankFull",
    "Bench",
    "CapacityError",
    "Check",
    "Concept",
    "ControlError",
    "Delta",
    "DimensionMismatch",
    "Diverged",
    "Engine",
    "EngineSettings",
    "Entry",
    "Finished",
    "FitSettings",
    "Grammar",
    "GrammarCompiler",
    "Guard",
    "IllConditioned",
    "Intervention",
    "Law",
    "Lqr",
    "Plant",
    "PlantError",
    "Positions",
    "Program",
    "Projections",
    "QueueFull",
    "Receipt",
    "Request",
    "Route",
    "Sampling",
    "Scope",
    "Shelf",
    "Site",
    "SpecError",
    "StaleFingerprint",
    "SteeringError",
    "Store",
    "TeamLost",
    "Term",
    "TokenLogprob",
    "Units",
    "VllmEngine",
    "VllmSettings",
    "When",
    "Window",
    "__version__",
    "capture",
    "check_whole",
    "compile_program",
    "diagnose",
    "echo",
    "encoded",
    "fit_concept",
    "read_examples",
    "register",
    "summary",
    "trace_prompt",
]


def __getattr__(name: str) -> Any:
    """Import a public name from where it is defined."""
    if name not in _HOME:
        raise AttributeError(f"module 'steering' has no public name {name!r}")
    if name == "REGISTRY":  # filled by the import of the methods
        import_module("steering.methods")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return list(__all__)
