"""The table of interventions, from which the HTTP schema, the documentation and the contract tests follow.

`@register` takes a frozen keyword-only dataclass with a `type: Literal["name"] = "name"` field and a `compile` method.
Nothing else has to change for a new method: pydantic reads the stdlib dataclass (and `__pydantic_config__`, a plain
attribute) where HTTP meets it.
"""

from __future__ import annotations

import sys
from typing import Any, Protocol, TypeVar, runtime_checkable

from steering.concept import Concept
from steering.condition import When
from steering.plan import Plan
from steering.plant.massive import Caution
from steering.program import Term

P = TypeVar("P", bound=Plan)


class Bench(Protocol):
    """What a method may ask while it compiles: the model's dimensions and perils, its concepts and its plans."""

    @property
    def depth(self) -> int:
        """L, the number of blocks."""

    @property
    def width(self) -> int:
        """D."""

    @property
    def caution(self) -> Caution:
        """What every write into the residual stream leaves alone."""

    def concept(self, name: str) -> Concept:
        """A concept of this model. Raises SpecError for an unknown one, StaleFingerprint for another model's."""

    def plan(self, name: str, kind: type[P]) -> P:
        """A plan of this model. Raises SpecError for an unknown one or one of another kind, StaleFingerprint."""


@runtime_checkable
class Intervention(Protocol):
    """A method's fields, and how they become laws. `compile` is pure; every error surfaces there, none at run time."""

    @property
    def type(self) -> str:
        """The name that the method has in requests."""

    @property
    def when(self) -> When | None:
        """The condition under which it acts, None for always."""

    @property
    def spare_massive(self) -> bool:
        """Whether it leaves massive activations alone."""

    def compile(self, bench: Bench) -> Term:
        """The term of a program. Raises SpecError, ControlError or ArtifactError."""


REGISTRY: dict[str, type] = {}
"""Every intervention by the name it has in requests, in the order of registration."""

T = TypeVar("T", bound=type)


def register(cls: T) -> T:
    """Class decorator: enter an intervention under its `type`. Raises ValueError when the name is taken."""
    method: Any = cls
    if method.type in REGISTRY:
        raise ValueError(f"an intervention named {method.type!r} is registered already")
    method.__pydantic_config__ = {"extra": "forbid", "use_attribute_docstrings": True}
    REGISTRY[method.type] = cls
    return cls


def summary(cls: type) -> str:
    """One line of documentation: the first line of the module that defines the method."""
    text = sys.modules[cls.__module__].__doc__ or cls.__doc__ or ""
    return text.strip().splitlines()[0]
