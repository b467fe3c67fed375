"""Plans: what the methods on weights and subspaces need of one model, frozen; one kind for each method.

A plan is an artifact whose `kind` is its own: `eigenshift`, `subspace`, `reft`. Its tensors are float32, the rest is in
the body. What a file must hold follows from the fields of the class: a tensor or a key too few or too many is
damage, and each kind adds what must be true of the numbers.

    eigenshift   rows v_i of an orthonormal basis at the final norm, and how far the positive mean lies along each
    subspace     per block: mean μ, leading and trailing eigenvectors of the covariance, spectrum, scores
    reft         per block: R, W, b of a trained low-rank edit of the block's output
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor

from steering.artifact import Artifact
from steering.errors import ArtifactCorrupt, StaleFingerprint

ORTHONORMAL = 1e-3
"""How far V Vᵀ of a stored basis may be from I: rounding to float32 is 1e-6, so beyond it is damage; a basis kept in
bfloat16 reaches 1e-2 and is no rotation."""
MAX_RANK = 128
"""Most channels that a plan's law may have on one route. A bank of 64 slots then takes 550 MB a route at width 8192."""

Selection = Literal["signed", "separation", "energy"]
"""How eigen-directions are chosen: see `steering.fit.eigenshift`."""
Form = Literal["loreft", "direft"]
"""Whether a low-rank edit measures what it overwrites: u = Rᵀ(W h + b − R h), or adds u = Rᵀ(W h + b)."""


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

    def _are_layers(self, layers: tuple[int, ...]) -> bool:
        """Whether `layers` are blocks of the model, ascending, at least one."""
        known = all(type(layer) is int and 0 <= layer < self.depth for layer in layers)
        return bool(layers) and known and list(layers) == sorted(set(layers))


@dataclass(frozen=True, eq=False, kw_only=True)
class EigenshiftPlan(Plan):
    """k eigen-directions of the head's WᵀW, in the order of their selection, and k random ones as the control.

    basis (k, D) orthonormal rows · sigma (k,) singular values of W, ≥ 0 · shift (k,) = v·(μ₊ − μ₋) at the final norm ·
    pooled (k,) standard deviation of v·h within the classes · control (k, D), control_shift (k,): the same for random
    eigen-directions other than the chosen ones where there are enough.
    """

    kind: ClassVar[str] = "eigenshift"

    selection: Selection
    basis: Tensor
    sigma: Tensor
    shift: Tensor
    pooled: Tensor
    control: Tensor
    control_shift: Tensor

    def _is_whole(self) -> bool:
        k = len(self.basis)
        return (
            self.selection in get_args(Selection)
            and 0 < k <= min(self.width, MAX_RANK)
            and self.basis.shape == self.control.shape == (k, self.width)
            and self.sigma.shape == self.shift.shape == self.pooled.shape == self.control_shift.shape == (k,)
            and bool((self.sigma >= 0).all() and (self.pooled >= 0).all())
            and is_orthonormal(self.basis)
            and is_orthonormal(self.control)
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class SubspacePlan(Plan):
    """Principal components of the inputs of n blocks, centred, position 0 and massive activations left out.

    layers (n,) · mean (n, D) · spectrum (n, D) eigenvalues, descending · leading (n, K, D) and trailing (n, M, D)
    orthonormal eigenvectors, the most and the least variable first · score (n, K) = |u·(μ₊ − μ₋)| / √λ of the leading
    ones · spikes (n,) how many eigenvalues lie above the Marchenko–Pastur edge · flagged (n,) how many of the spikes
    among the leading ones score above the fit's quantile.
    """

    kind: ClassVar[str] = "subspace"

    layers: tuple[int, ...]
    mean: Tensor
    spectrum: Tensor
    leading: Tensor
    trailing: Tensor
    score: Tensor
    spikes: tuple[int, ...]
    flagged: tuple[int, ...]

    def _is_whole(self) -> bool:
        n, (_, K, _), (_, M, _) = len(self.layers), self.leading.shape, self.trailing.shape
        return (
            self._are_layers(self.layers)
            and 0 < K <= self.width
            and max(K, M) <= self.width
            and self.mean.shape == self.spectrum.shape == (n, self.width)
            and self.leading.shape == (n, K, self.width)
            and self.trailing.shape == (n, M, self.width)
            and self.score.shape == (n, K)
            and len(self.spikes) == len(self.flagged) == n
            and all(type(count) is int and 0 <= count <= self.width for count in (*self.spikes, *self.flagged))
            and all(count <= min(K, spikes) for count, spikes in zip(self.flagged, self.spikes, strict=True))
            and bool((self.spectrum >= 0).all() and (self.spectrum.diff(dim=-1) <= 0).all() and (self.score >= 0).all())
            and all(is_orthonormal(basis) for basis in (*self.leading, *self.trailing))
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class ReftPlan(Plan):
    """A low-rank edit of the outputs of n blocks.

    layers (n,) · form · rotation R (n, r, D), orthonormal rows where `is_rotation` · weight W (n, r, D) · bias b
    (n, r) · first, last: how many prompt positions it was trained on at the prompt's beginning and end; 0 and 0 where
    that is not known.
    """

    kind: ClassVar[str] = "reft"

    layers: tuple[int, ...]
    form: Form
    is_rotation: bool
    first: int
    last: int
    rotation: Tensor
    weight: Tensor
    bias: Tensor

    def _is_whole(self) -> bool:
        n, (_, r, _) = len(self.layers), self.rotation.shape
        return (
            self._are_layers(self.layers)
            and self.form in get_args(Form)
            and type(self.is_rotation) is bool
            and all(type(count) is int and 0 <= count <= 4096 for count in (self.first, self.last))
            and 0 < r <= min(self.width, MAX_RANK)
            and self.rotation.shape == self.weight.shape == (n, r, self.width)
            and self.bias.shape == (n, r)
            and (not self.is_rotation or all(is_orthonormal(R_RD) for R_RD in self.rotation))
        )


PLANS: dict[str, type[Plan]] = {cls.kind: cls for cls in (EigenshiftPlan, SubspacePlan, ReftPlan)}
"""Every kind of plan by its name."""


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
