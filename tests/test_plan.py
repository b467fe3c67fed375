"""A plan survives the disk, is refused when it is not whole, and a shelf gives it only to who asks for its kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steering.artifact import Artifact
from steering.errors import ArtifactCorrupt, SpecError, StaleFingerprint
from steering.plan import PLANS, EigenshiftPlan, Plan, ReftPlan, SubspacePlan
from steering.store import Shelf, Store, held_in
from tests import plans
from tests.toy import MODEL, toy

WHOLE: dict[str, Plan] = {
    "eigenshift": plans.stored(plans.eigenshift()),
    "subspace": plans.stored(plans.subspace()),
    "reft": plans.stored(plans.reft()),
}
every = pytest.mark.parametrize("kind", PLANS)


def test_every_kind_is_tested() -> None:
    assert set(WHOLE) == set(PLANS)


@every
def test_round_trip(kind: str, tmp_path: Path) -> None:
    plan = WHOLE[kind]
    loaded = type(plan).from_artifact(Artifact.load(plan.artifact().save(tmp_path)))
    for field in fields(plan):
        a, b = getattr(loaded, field.name), getattr(plan, field.name)
        assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b, field.name
    assert loaded.artifact().fingerprint == plan.artifact().fingerprint
    assert plan.artifact().kind == kind


def changed(name: str, value: object) -> Callable[[Artifact], Artifact]:
    """An artifact with one tensor or one field of the body replaced; None removes it."""

    def change(artifact: Artifact) -> Artifact:
        place = "tensors" if name in artifact.tensors or isinstance(value, torch.Tensor) else "body"
        part: dict[str, Any] = {**getattr(artifact, place), name: value}
        if value is None:
            del part[name]
        return replace(artifact, **{place: part})

    return change


@every
def test_nothing_may_be_missing_or_unknown(kind: str) -> None:
    artifact = WHOLE[kind].artifact()
    damages = [changed(name, None) for name in (*artifact.tensors, *artifact.body)]
    damages += [changed("more", 1), changed("more", torch.zeros(1)), lambda a: replace(a, kind="concept")]
    for damage in damages:
        with pytest.raises(ArtifactCorrupt, match="is not a whole plan of kind"):
            type(WHOLE[kind]).from_artifact(damage(artifact))


@every
def test_tensors_are_float32_and_of_one_shape(kind: str) -> None:
    artifact = WHOLE[kind].artifact()
    for name, tensor in artifact.tensors.items():
        for wrong in (tensor.double(), tensor[..., :-1], tensor[None]):
            with pytest.raises(ArtifactCorrupt):
                type(WHOLE[kind]).from_artifact(changed(name, wrong)(artifact))


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        *((kind, name, value) for kind in PLANS for name in ("depth", "width") for value in (0, -1, 5.0, "6", True)),
        *((kind, name, 3) for kind in PLANS for name in ("quality", "provenance")),
        *((kind, "layers", v) for kind in ("subspace", "reft") for v in ([], [3, 1], [1, 1], [0, 9], [1.0, 2], 3)),
        ("eigenshift", "selection", "largest"),
        ("eigenshift", "basis", 2 * plans.eigenshift().basis.float()),
        ("eigenshift", "control", torch.ones(3, 6)),
        ("eigenshift", "sigma", -torch.ones(3)),
        ("eigenshift", "pooled", -torch.ones(3)),
        ("subspace", "spectrum", plans.subspace().spectrum.float().flip(1)),
        ("subspace", "score", -torch.ones(3, 3)),
        ("subspace", "trailing", torch.ones(3, 3, 6)),
        ("subspace", "spikes", [1, 1]),
        ("subspace", "spikes", [7, 2, 2]),
        ("subspace", "flagged", [3, 1, 1]),
        ("subspace", "flagged", [True, 1, 1]),
        ("reft", "form", "noreft"),
        ("reft", "is_rotation", 1),
        ("reft", "first", -1),
        ("reft", "last", 10**6),
        ("reft", "rotation", torch.ones(2, 2, 6)),
    ],
)
def test_impossible_values_are_refused(kind: str, name: str, value: object) -> None:
    with pytest.raises(ArtifactCorrupt, match=f"is not a whole plan of kind '{kind}'"):
        PLANS[kind].from_artifact(changed(name, value)(WHOLE[kind].artifact()))


def test_rows_that_are_no_rotation_may_be_of_any_length() -> None:
    plan = plans.stored(plans.reft("direft"))
    assert ReftPlan.from_artifact(plan.artifact()).form == "direft"


# The shelf


def shelf(folder: Path, *, model: str = MODEL, depth: int = 4, width: int = 6) -> Shelf:
    store = Store(folder)
    for plan in WHOLE.values():
        store.save(plan.artifact())
    store.save(toy().resident().tone.artifact())
    return Shelf(store, model=model, depth=depth, width=width)


def test_a_plan_is_loaded_once_until_its_file_changes(tmp_path: Path) -> None:
    bench = shelf(tmp_path)
    first = bench.plan("toxic", EigenshiftPlan)
    assert bench.plan("toxic", EigenshiftPlan) is first
    bench.store.save(replace(WHOLE["eigenshift"], quality={"auroc": 0.9}).artifact())
    assert bench.plan("toxic", EigenshiftPlan).quality == {"auroc": 0.9}


def test_an_unknown_plan_is_refused_with_the_names_of_its_kind(tmp_path: Path) -> None:
    for name in ("absent", "../toxic"):
        with pytest.raises(SpecError, match=r"a plan of kind 'subspace' of this model \(pca\)") as caught:
            shelf(tmp_path).plan(name, SubspacePlan)
        assert caught.value.param == "plan"


@pytest.mark.parametrize(("name", "kind"), [("pca", "subspace"), ("tone", "concept")])
def test_another_kind_is_refused(tmp_path: Path, name: str, kind: str) -> None:
    bench = shelf(tmp_path)
    bench.plan("pca", SubspacePlan)
    with pytest.raises(SpecError, match=f"a plan of kind 'eigenshift', got '{name}'; .* of kind '{kind}'") as caught:
        bench.plan(name, EigenshiftPlan)
    assert caught.value.param == "plan"


def test_another_model_s_plan_is_stale_and_both_sides_are_told(tmp_path: Path) -> None:
    with pytest.raises(StaleFingerprint, match=r"was made for model sha256:abab.*, this is sha256:00…;") as caught:
        shelf(tmp_path, model="sha256:00").plan("pca", SubspacePlan)
    assert caught.value.param == "plan"
    with pytest.raises(StaleFingerprint, match=r"of 4 layers of width 6, this is .* of 5 layers of width 7"):
        shelf(tmp_path, depth=5, width=7).plan("pca", SubspacePlan)


def test_what_an_artifact_holds_is_of_its_kind() -> None:
    for kind, plan in WHOLE.items():
        assert type(held_in(plan.artifact())) is PLANS[kind]
    assert held_in(toy().resident().tone.artifact()).name == "tone"
    with pytest.raises(ArtifactCorrupt, match="holds a 'zoo'; expected a concept, or a plan of kind eigenshift"):
        held_in(Artifact("x", "zoo", MODEL, {}))


def test_a_shelf_knows_whose_a_plan_or_a_concept_is(tmp_path: Path) -> None:
    ours, theirs = shelf(tmp_path), shelf(tmp_path, model="sha256:00")
    for held in (WHOLE["reft"], toy().resident().tone):
        ours.require_own(held, "x")
        with pytest.raises(StaleFingerprint, match="'x'"):
            theirs.require_own(held, "x")


def test_a_damaged_plan_is_refused(tmp_path: Path) -> None:
    bench = shelf(tmp_path)
    path = bench.store.path("pca")
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ArtifactCorrupt) as caught:
        bench.plan("pca", SubspacePlan)
    assert caught.value.param == "plan"
