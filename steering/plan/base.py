"""What all kinds of plan share: identity, soundness, and the way to and from an artifact.

A plan is an artifact whose `kind` is its own. Its tensors are float32, the rest is in the body. What a file must hold
follows from the fields of the class: a tensor or a key too few or too many is damage, and each kind adds what must be
true of the numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from steering.artifact import Artifact
from steering.errors import ArtifactCorrupt, StaleFingerprint

ORTHONORMAL = 1e-3
"""How far V Vᵀ of a stored basis may be from I: rounding to float32 is 1e-6, so beyond it is damage; a basis kept in
bfloat16 reaches 1e-2 and is no rotation."""
MAX_RANK = 128
"""Most channels that a plan's law may have on one route. A bank of 64 slots then takes 550 MB a route at width 8192."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Plan(ABC):
    """What all kinds share. depth L and width D are those of the model that it was made for."""

    kind: ClassVar[str] = ""

    name: str
    model: str
    depth: int
    width: int
    quality: Mapping[str, Any]
    provenance: Mapping[str, Any]

    def artifact(self) -> Artifact:
        """The plan as an artifact, ready to be saved."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("name", "model")}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        body = {name: _json(value) for name, value in values.items() if name not in tensors}
        return Artifact(self.name, self.kind, self.model, tensors, body)

    @classmethod
    def from_artifact(cls, artifact: Artifact) -> Self:
        """Raises ArtifactCorrupt when it is of another kind, a tensor or a field is missing, unknown or wrong, or the
        shapes disagree."""
        wanted = {f.name: f.type for f in fields(cls) if f.name not in ("name", "model")}
        tensors = {name for name, kind in wanted.items() if kind == "Tensor"}
        try:
            whole = artifact.kind == cls.kind and set(artifact.tensors) == tensors
            if whole and set(artifact.body) == set(wanted) - tensors:
                body = {n: tuple(v) if str(wanted[n]).startswith("tuple") else v for n, v in artifact.body.items()}
                known: dict[str, Any] = {**artifact.tensors, **body}
                plan = cls(name=artifact.name, model=artifact.model, **known)
                if plan._is_sound() and plan._is_whole():
                    return plan
        except (KeyError, ValueError, TypeError, IndexError, AttributeError, RuntimeError) as error:
            raise _not_whole(artifact, cls.kind) from error
        raise _not_whole(artifact, cls.kind)

    def require(self, *, model: str, depth: int, width: int, label: str = "") -> Self:
        """The plan if it is one of this model's. Raises StaleFingerprint that tells both sides; `label` is its name."""
        theirs, ours = (self.depth, self.width), (depth, width)
        if self.model == model and theirs == ours:
            return self
        sizes = f" of {theirs[0]} layers of width {theirs[1]}", f" of {ours[0]} layers of width {ours[1]}"
        said, own = ("", "") if theirs == ours else sizes
        raise StaleFingerprint(
            f"Plan {label or self.name!r} was made for model {self.model[:19]}…{said}, this is {model[:19]}…{own}; "
            "make it again for this model.",
            param="plan",
        )

    def _is_sound(self) -> bool:
        """Whether the common fields and the number formats are right."""
        values = [getattr(self, f.name) for f in fields(self)]
        return (
            all(type(size) is int and size > 0 for size in (self.depth, self.width))
            and isinstance(self.quality, dict)
            and isinstance(self.provenance, dict)
            and all(t.dtype == torch.float32 for t in values if isinstance(t, Tensor))
        )

    @abstractmethod
    def _is_whole(self) -> bool:
        """Whether the numbers are those of this kind."""

    def are_layers(self, layers: tuple[int, ...]) -> bool:
        """Whether `layers` are blocks of the model, ascending, at least one."""
        known = all(type(layer) is int and 0 <= layer < self.depth for layer in layers)
        return bool(layers) and known and list(layers) == sorted(set(layers))


def is_orthonormal(basis_RD: Tensor) -> bool:
    """Whether the rows are orthonormal to float32's accuracy; no rows are."""
    gram_RR = basis_RD.double() @ basis_RD.double().mT
    return bool(((gram_RR - torch.eye(len(basis_RD), dtype=torch.float64)).abs() <= ORTHONORMAL).all())


def _json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value


def _not_whole(artifact: Artifact, kind: str) -> ArtifactCorrupt:
    return ArtifactCorrupt(
        f"Artifact {artifact.name!r} is not a whole plan of kind {kind!r}; make it again.", param="plan"
    )
