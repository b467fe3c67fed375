"""A concept survives the disk, knows its gains, and is refused when it is not whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steering.artifact import Artifact
from steering.concept import Concept
from steering.control import identity_gains
from steering.errors import ArtifactCorrupt, SpecError
from tests.toy import WEIGHTS, toy

TONE = replace(toy().resident().tone, provenance={"data": "sha256:1", "settings": {"layers": (1, 2)}})


def test_round_trip(tmp_path: Path) -> None:
    loaded = Concept.from_artifact(Artifact.load(TONE.artifact().save(tmp_path)))
    for name in ("direction", "magnitude", "origin"):
        assert torch.equal(getattr(loaded, name), getattr(TONE, name))
    assert loaded.gains.keys() == TONE.gains.keys()
    assert torch.equal(loaded.gain("dense"), TONE.gain("dense"))
    assert (loaded.name, loaded.model, loaded.layers, loaded.weights, loaded.default_gains) == (
        "tone",
        TONE.model,
        (1, 2, 3),
        WEIGHTS,
        "dense",
    )
    assert loaded.quality == {"auroc": [0.5]}
    assert loaded.artifact().fingerprint == TONE.artifact().fingerprint
    assert (loaded.depth, loaded.width) == (4, 6)


def test_gains() -> None:
    assert torch.equal(TONE.gain(), TONE.gains["dense"])
    assert torch.equal(TONE.gain("dense"), TONE.gains["dense"])
    with pytest.raises(SpecError, match=r"dense.*identity") as caught:
        TONE.gain("matrix_free")
    assert caught.value.param == "gains"


def test_identity_gains_follow_from_the_weights() -> None:
    gain_LD = TONE.gain("identity")
    assert gain_LD.shape == (4, 6)
    assert not gain_LD[0].any()
    torch.testing.assert_close(gain_LD[1:], identity_gains(TONE.direction[1:], WEIGHTS).float(), rtol=0, atol=0)
    # the last one in closed form: q_f / (q_f + r) along its direction
    torch.testing.assert_close(gain_LD[3], 2.0 / 3.3 * TONE.direction[3])


def test_a_stored_gain_named_identity_is_used_as_it_is() -> None:
    stored = replace(TONE, gains={"identity": torch.ones(4, 6)}, default_gains="identity")
    assert torch.equal(stored.gain(), torch.ones(4, 6))


def test_layers_without_a_gain_are_named() -> None:
    TONE.require_gain((1, 3), TONE.gain())
    with pytest.raises(SpecError, match=r"\[1, 2, 3\], got 0") as caught:
        TONE.require_gain((1, 0), TONE.gain())
    assert caught.value.param == "layers"


def changed(name: str, value: object) -> Callable[[Artifact], Artifact]:
    """An artifact with one tensor or one field of the body replaced; None removes it."""

    def change(artifact: Artifact) -> Artifact:
        part: dict[str, Any] = dict(artifact.tensors if name in artifact.tensors else artifact.body)
        part[name] = value
        if value is None:
            del part[name]
        return replace(artifact, **{"tensors" if name in artifact.tensors else "body": part})

    return change


@pytest.mark.parametrize(
    "damage",
    [
        lambda a: replace(a, kind="plan"),
        *(changed(name, None) for name in ("direction", "magnitude", "origin", "gain.dense")),
        *(changed(name, None) for name in ("layers", "weights", "default_gains", "quality", "provenance")),
        changed("direction", torch.ones(5)),
        changed("direction", 2 * TONE.direction),
        changed("direction", TONE.direction.double()),
        changed("direction", TONE.direction[:4]),
        changed("magnitude", torch.ones(4)),
        changed("magnitude", -TONE.magnitude),
        changed("origin", torch.ones(5, 1)),
        changed("gain.dense", torch.ones(4, 5)),
        changed("layers", []),
        changed("layers", [1, 3]),
        changed("layers", [3, 4]),
        changed("layers", [-1, 0]),
        changed("layers", [1.0, 2.0]),
        changed("layers", ["1"]),
        changed("layers", 3),
        changed("weights", {"q": 1.0, "r": 0.0, "q_f": 1.0}),
        changed("weights", {"q": 1.0, "r": 1.0, "q_f": 1.0, "s": 1.0}),
        changed("weights", {"q": "1", "r": 1.0, "q_f": 1.0}),
        changed("default_gains", "matrix_free"),
        changed("default_gains", ["dense"]),
        changed("quality", 3),
    ],
)
def test_what_is_not_whole_is_refused(damage: Callable[[Artifact], Artifact]) -> None:
    with pytest.raises(ArtifactCorrupt, match="'tone' is not a whole concept"):
        Concept.from_artifact(damage(TONE.artifact()))


def test_a_zero_direction_is_whole() -> None:
    direction = TONE.direction.clone()
    direction[0] = 0
    assert not Concept.from_artifact(replace(TONE, direction=direction).artifact()).direction[0].any()
