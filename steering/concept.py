"""A concept: what a fit learns about one feature of one model, frozen.

For the states x_0 … x_L (x_l the input of block l, x_L the last block's output) it holds unit directions v_l,
magnitudes ‖E_l‖ of the difference of means E_l = μ₊ − μ₋, origins v_l·μ₋, and for the controlled layers the gains
w_l = K_l v_l. One concept may carry several gains (`dense`, `matrix_free`); `identity` (A = I) follows from the weights
alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from steering.artifact import Artifact
from steering.control import Weights, identity_gains
from steering.errors import ArtifactCorrupt, ControlError, SpecError
from steering.types import Gains

KIND = "concept"
UNIT = 1e-4
"""How far the norm of a stored direction may be from 1: rounding to float32 is 1e-6 at most, so beyond it is damage."""


@dataclass(frozen=True, eq=False)
class Concept:
    """Directions, magnitudes, origins and gains of one feature.

    direction (L+1, D) float32, unit rows (a zero row where the classes do not differ) · magnitude (L+1,) ·
    origin (L+1,) · gains: name → (L, D) float32, zero rows outside `layers` · layers: the controlled blocks,
    contiguous.
    """

    name: str
    model: str
    direction: Tensor
    magnitude: Tensor
    origin: Tensor
    gains: Mapping[str, Tensor]
    layers: tuple[int, ...]
    weights: Weights
    default_gains: Gains
    quality: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        """L, the number of blocks."""
        return self.direction.shape[0] - 1

    @property
    def width(self) -> int:
        """D."""
        return self.direction.shape[1]

    def gain(self, kind: Gains | None = None) -> Tensor:
        """w (L, D) for one kind of gain; None: the concept's own choice. Raises SpecError when it was not fitted."""
        wanted = kind or self.default_gains
        if wanted in self.gains:
            return self.gains[wanted]
        if wanted == "identity":
            gain_LD = torch.zeros_like(self.direction[:-1])
            first, last = self.layers[0], self.layers[-1]
            gain_LD[first : last + 1] = identity_gains(self.direction[first : last + 2], self.weights).to(torch.float32)
            return gain_LD
        raise SpecError(
            "gains", expected=f"one of {sorted({*self.gains, 'identity'})}, which concept {self.name!r} has", got=wanted
        )

    def require_gain(self, layers: tuple[int, ...], gain_LD: Tensor) -> None:
        """Raises SpecError when one of `layers` has no gain."""
        for layer in layers:
            if not gain_LD[layer].any():
                raise SpecError(
                    "layers", expected=f"layers that concept {self.name!r} controls, {list(self.layers)}", got=layer
                )

    def artifact(self) -> Artifact:
        """The concept as an artifact, ready to be saved."""
        tensors = {"direction": self.direction, "magnitude": self.magnitude, "origin": self.origin}
        body = {
            "layers": list(self.layers),
            "weights": asdict(self.weights),
            "default_gains": self.default_gains,
            "quality": dict(self.quality),
            "provenance": dict(self.provenance),
        }
        tensors |= {f"gain.{kind}": gain for kind, gain in self.gains.items()}
        return Artifact(self.name, KIND, self.model, tensors, body)

    @classmethod
    def from_artifact(cls, artifact: Artifact) -> Concept:
        """Raises ArtifactCorrupt when a tensor or a field is missing or wrong, or the shapes disagree."""
        tensors, body = artifact.tensors, artifact.body
        try:
            gains = {name.removeprefix("gain."): t for name, t in tensors.items() if name.startswith("gain.")}
            concept = cls(
                artifact.name,
                artifact.model,
                tensors["direction"],
                tensors["magnitude"],
                tensors["origin"],
                gains,
                tuple(body["layers"]),
                Weights(**body["weights"]),
                body["default_gains"],
                dict(body["quality"]),
                dict(body["provenance"]),
            )
            whole = artifact.kind == KIND and concept._is_whole()
        except (ControlError, KeyError, ValueError, TypeError, IndexError) as error:
            raise _not_whole(artifact) from error
        if not whole:
            raise _not_whole(artifact)
        return concept

    def _is_whole(self) -> bool:
        """Whether shapes, number formats, layers and norms are those of a fitted concept."""
        rows, width = self.direction.shape
        tensors = (self.direction, self.magnitude, self.origin, *self.gains.values())
        norm_L = self.direction.norm(dim=-1)
        return (
            all(tensor.dtype == torch.float32 for tensor in tensors)
            and self.magnitude.shape == self.origin.shape == (rows,)
            and bool(self.gains)
            and all(gain.shape == (rows - 1, width) for gain in self.gains.values())
            and all(type(layer) is int and 0 <= layer < rows - 1 for layer in self.layers)
            and self.layers == tuple(range(self.layers[0], self.layers[0] + len(self.layers)))
            and self.default_gains in {*self.gains, "identity"}
            and bool((self.magnitude >= 0).all())
            # a clamp is exact only along a unit direction
            and bool(((norm_L == 0) | ((norm_L - 1).abs() < UNIT)).all())
        )


def _not_whole(artifact: Artifact) -> ArtifactCorrupt:
    return ArtifactCorrupt(
        f"Artifact {artifact.name!r} is not a whole concept; fit it again with `setpoint fit`.", param="name"
    )
