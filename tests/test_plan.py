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
    "neurons": plans.stored(plans.neurons()),
    "heads": plans.stored(plans.heads()),
    "act_add": plans.stored(plans.act_add()),
    "transport": plans.stored(plans.transport()),
    "interaction": plans.stored(plans.interaction()),
    "channels": plans.stored(plans.channels()),
    "adapter": plans.stored(plans.adapter()),
    "sparsity": plans.stored(plans.sparsity()),
    "layers": plans.stored(plans.layers()),
    "sae": plans.stored(plans.sae()),
    "language": plans.stored(plans.language()),
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
        ("sae", "tap", "final"),
        ("sae", "measured", "some"),
        ("sae", "layers", [1]),
        ("sae", "decoder", 2 * plans.sae().decoder.float()),
        ("sae", "encoder", torch.full((2, 9, 6), torch.nan)),
        ("sae", "threshold", -torch.ones(2, 9)),
        ("sae", "scale", torch.zeros(2)),
        ("sae", "peak", -torch.ones(2, 9)),
        ("sae", "rate", 2 * torch.ones(2, 9)),
        ("sae", "control", torch.zeros(2, 9)),
        ("sae", "control", plans.sae().control.float() + 0.5),
        ("sae", "control", plans.sae().control.float() + 1),
        ("language", "tap", "final"),
        ("language", "layers", [1]),
        ("language", "counts", [3, 0]),
        ("language", "counts", [3, 4]),
        ("language", "target", torch.ones(2, 3)),
        ("language", "source", torch.eye(3)[1:]),
        ("language", "shift", -torch.ones(2)),
        ("language", "write", torch.full((2, 3, 6), torch.inf)),
        ("reft", "form", "noreft"),
        ("reft", "is_rotation", 1),
        ("reft", "first", -1),
        ("reft", "last", 10**6),
        ("transport", "site", "resid_pre"),
        ("transport", "form", "cubic"),
        ("transport", "layers", [3, 1]),
        ("transport", "scale", -torch.ones(2, 6)),
        ("transport", "shift", torch.full((2, 6), float("inf"))),
        ("transport", "low", torch.full((2, 6), 9.0)),
        ("transport", "high", torch.full((2, 5), 9.0)),
        ("reft", "rotation", torch.ones(2, 2, 6)),
        *(("sparsity", "layers", value) for value in ([], [2, 1], [1, 9], [1.0, 2])),
        ("sparsity", "sites", ["mlp_act", "attn_in"]),
        ("sparsity", "sites", ["attn_in", "mlp_out"]),
        ("sparsity", "widths", [6, 5]),
        ("sparsity", "widths", [5, 7]),
        ("sparsity", "size", [108]),
        ("sparsity", "score", "teal"),
        ("sparsity", "rule", "none"),
        ("sparsity", "allocation", "random"),
        ("sparsity", "target", 0.4),
        ("sparsity", "levels", [0.25, 0.75, 0.5]),
        ("sparsity", "levels", [0.25, 0.5, 1.5]),
        ("sparsity", "weight", -torch.ones(2, 12)),
        ("sparsity", "share", plans.sparsity().share.float().flip(-1)),
        ("sparsity", "share", 2 * plans.sparsity().share.float()),
        ("sparsity", "threshold", plans.sparsity().threshold.float().flip(-1)),
        ("sparsity", "rest", 2 * plans.sparsity().rest.float()),
        ("sparsity", "control", 2 * torch.ones(2, 12)),
        ("layers", "depth", 10**12),
        ("layers", "order", [2, 7, 1, 3, 6, 5, 4, 4]),
        ("layers", "order", [7, 2, 1, 3, 6, 5, 4, 0]),
        ("layers", "control", [0, 1, 2, 3]),
        ("layers", "score", 2 * torch.ones(2, 4)),
        ("layers", "influence", -torch.ones(4)),
        ("neurons", "site", "attn_act"),
        ("neurons", "method", "largest"),
        ("neurons", "layers", [3, 1]),
        ("neurons", "spans", [6]),
        ("neurons", "spans", [6, 0]),
        ("neurons", "layer", torch.tensor([3.0, 1.0, 2.0, 3.0])),
        ("neurons", "index", torch.tensor([4.0, 0.5, 2.0, 1.0])),
        ("neurons", "index", torch.tensor([4.0, 6.0, 2.0, 1.0])),
        ("neurons", "control", torch.tensor([2.0, -1.0, 4.0, 5.0])),
        ("neurons", "score", torch.full((4,), float("inf"))),
        ("neurons", "auroc", torch.full((4,), 1.5)),
        ("neurons", "deviation", -torch.ones(4)),
        ("neurons", "massive", torch.tensor([[1.0, 6.0]])),
        ("neurons", "massive", torch.ones(2**20 + 1, 2)),
        ("heads", "layers", [1, 1]),
        ("heads", "probe", "best"),
        ("heads", "accuracy", torch.full((2, 2), 1.5)),
        ("heads", "direction", torch.ones(2, 2, 3)),
        ("heads", "deviation", -torch.ones(2, 2)),
        ("heads", "mean", torch.full((2, 2, 3), float("inf"))),
        ("heads", "order", torch.tensor([3.0, 1.0, 1.0, 2.0])),
        ("heads", "control", torch.tensor([3.0, 1.0, 0.5, 2.0])),
        ("heads", "order", torch.zeros(1).expand(10**12)),
        ("act_add", "layers", [1, 2, 9]),
        ("act_add", "difference", torch.full((3, 2, 6), float("inf"))),
        ("act_add", "control", torch.zeros(3, 1, 6)),
        ("interaction", "layers", [3, 1, 2]),
        ("interaction", "ranks", [6, 6]),
        ("interaction", "ranks", [6, 7, 6]),
        ("interaction", "ranks", [6, 2, 6]),
        ("interaction", "spectrum", plans.interaction().spectrum.float().flip(1)),
        ("interaction", "gain", -plans.interaction().gain.float()),
        ("interaction", "probe_rest", 2 * plans.interaction().probe_rest.float()),
        ("interaction", "pca", torch.ones(3, 3, 6)),
        ("channels", "above", 5),
        ("channels", "above", True),
        ("channels", "heads", 1),
        ("channels", "heads", 2**70),
        ("channels", "head_width", 3.0),
        ("channels", "source_layer", [1, 1, 1, 4]),
        ("channels", "source_layer", [1, 3, 1, 2]),
        ("channels", "source_head", [0, 1, 0]),
        ("channels", "component", [0, 3, 0, 1]),
        ("channels", "reader", ["query", "value", "key", "output"]),
        ("channels", "direction", 2 * plans.channels().direction.float()),
        ("channels", "score", -torch.ones(4)),
        ("adapter", "modules", ["layers.1.q", "layers.1.q", "layers.3.o"]),
        ("adapter", "modules", ["layers.3.o", "layers.1.q", "layers.1.down"]),
        ("adapter", "modules", ["layers.1.q", "layers.1.down", "layers.4.o"]),
        ("adapter", "modules", ["layers.1.q", "layers.1.down", "layers.3.head"]),
        ("adapter", "ranks", [2, 2, 2]),
        ("adapter", "ranks", [2, 2.0, 3]),
        ("adapter", "inner", [6, 6]),
        ("adapter", "inner", [6, 5, 7]),
        ("adapter", "outer", [6, 0, 6]),
        ("adapter", "a", torch.full((42,), float("inf"))),
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
