"""pyreft's layout becomes a plan, whichever of its interventions wrote it; nothing that could run code is opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from steering.errors import ArtifactCorrupt, SpecError
from steering.formats.pyreft import import_reft, parse_positions
from steering.methods import Reft
from steering.plan import Form, ReftPlan
from steering.plant.plant import Plant
from tests.plants import WIDTH, tiny, tiny_tokenizer

RANK = 3


@pytest.fixture(scope="module")
def plant() -> Plant:
    return Plant(tiny("llama"), tiny_tokenizer())


class Rotate(nn.Module):
    """x → x weight, weight (D, r) with orthonormal columns, as pyreft holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(WIDTH, RANK))
        nn.init.orthogonal_(self.weight)
        nn.utils.parametrizations.orthogonal(self)
        with torch.no_grad():  # as after some training: away from what it began with
            self.parametrizations.weight.original.add_(0.3 * torch.randn(WIDTH, RANK).tril(-1))  # type: ignore[union-attr]


def intervention(kind: str, seed: int) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """The tensors that an intervention of pyreft saves, and its R (r, D), W (r, D), b (r,)."""
    torch.manual_seed(seed)
    source = nn.Linear(WIDTH, RANK)
    W, b = source.weight.detach(), source.bias.detach()
    named = {"learned_source.weight": W, "learned_source.bias": b}
    if kind.startswith("No"):
        R = torch.randn(RANK, WIDTH)
        return {**named, "proj_layer.weight": R}, R, W, b
    rotate = Rotate()
    with torch.no_grad():
        R = rotate.weight.mT.clone()
    if kind == "Loreft":
        return {"weight": W, "bias": b, "rotate_layer": R.mT.contiguous()}, R, W, b
    trained = {f"rotate_layer.{k}": v.detach().contiguous().clone() for k, v in rotate.state_dict().items()}
    return {**named, **trained}, R, W, b


def key(layer: int) -> str:
    return f"intkey_layer.{layer}.comp.block_output.unit.pos.nunit.1#0"


def saved(folder: Path, kind: str, layers: tuple[int, ...] = (0, 2)) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    folder.mkdir(exist_ok=True)
    expected = {}
    for layer in layers:
        tensors, *expected[layer] = intervention(kind, layer)  # type: ignore[assignment]
        save_file(tensors, folder / f"{key(layer)}.safetensors")
    types = [f"<class 'pyreft.interventions.{kind}Intervention'>"] * len(layers)
    (folder / "config.json").write_text(json.dumps({"intervention_types": types}))
    return expected


@pytest.mark.parametrize(
    ("kind", "form"), [("Loreft", "loreft"), ("Direft", "direft"), ("Noreft", "loreft"), ("Nodireft", "direft")]
)
def test_every_intervention_becomes_its_formula(plant: Plant, tmp_path: Path, kind: str, form: Form) -> None:
    expected = saved(tmp_path / "reft", kind)
    plan = import_reft(tmp_path / "reft", "edit", plant, positions="f2+l1")
    assert (plan.form, plan.layers, plan.first, plan.last) == (form, (0, 2), 2, 1)
    assert plan.is_rotation == (not kind.startswith("No"))
    assert plan.model == plant.fingerprint
    assert ReftPlan.from_artifact(plan.artifact()).layers == (0, 2)

    class Bench:
        depth, width = plant.depth, plant.width

        def plan(self, name: str, kind: type) -> ReftPlan:
            return plan

    h = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(9))
    for route, law in Reft(plan="edit").compile(Bench()).laws.items():  # type: ignore[arg-type]
        R, W, b = expected[route.write.layer]
        inner = h @ W.mT + b - (h @ R.mT if form == "loreft" else 0)
        torch.testing.assert_close(law(h, h), h + inner @ R, rtol=1e-4, atol=1e-5)


def test_newer_versions_write_underscores(plant: Plant, tmp_path: Path) -> None:
    saved(tmp_path, "Loreft", (1,))
    dots = tmp_path / f"{key(1)}.safetensors"
    dots.rename(tmp_path / f"{key(1).replace('.', '_')}.safetensors")
    assert import_reft(tmp_path, "edit", plant).layers == (1,)


@pytest.mark.parametrize(
    ("text", "pair"), [("f7+l7", (7, 7)), ("f3", (3, 0)), ("l1", (0, 1)), ("", (0, 0)), ("f0+l2", (0, 2))]
)
def test_positions(text: str, pair: tuple[int, int]) -> None:
    assert parse_positions(text) == pair


@pytest.mark.parametrize("text", ["7+7", "+l7", "f7+", "f7l", "l7+f7", "all", "f-1", "f99999"])
def test_other_positions_are_refused(text: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_positions(text)
    assert caught.value.param == "positions"


def test_pickles_are_named_and_never_opened(plant: Plant, tmp_path: Path) -> None:
    (tmp_path / f"{key(0)}.bin").write_bytes(b"\x80\x04cposix\nsystem\n")
    with pytest.raises(SpecError, match=r"\.bin files, which are pickles"):
        import_reft(tmp_path, "edit", plant)
    with pytest.raises(SpecError, match="expected a folder with"):
        import_reft(tmp_path / "absent", "edit", plant)


def test_what_the_folder_does_not_tell_may_be_said(plant: Plant, tmp_path: Path) -> None:
    saved(tmp_path, "Direft")
    (tmp_path / "config.json").unlink()
    with pytest.raises(SpecError, match=r"config\.json does not tell"):
        import_reft(tmp_path, "edit", plant)
    assert import_reft(tmp_path, "edit", plant, form="direft").form == "direft"


@pytest.mark.parametrize(
    "types", [[], ["<class 'pyreft.interventions.LobireftIntervention'>"], ["LoreftIntervention", "DireftIntervention"]]
)
def test_interventions_that_are_no_such_law_are_refused(plant: Plant, tmp_path: Path, types: list[str]) -> None:
    saved(tmp_path, "Loreft")
    (tmp_path / "config.json").write_text(json.dumps({"intervention_types": types}))
    with pytest.raises(SpecError) as caught:
        import_reft(tmp_path, "edit", plant)
    assert caught.value.param == "form"


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        (key(0).replace("block_output", "mlp_output"), "files intkey_layer"),
        (key(0).replace("#0", "#1"), "files intkey_layer"),
        ("intkey_other", "files intkey_layer"),
        (key(3), r"layers in 0\.\.2, got 3"),
    ],
)
def test_files_of_another_layout_are_refused(plant: Plant, tmp_path: Path, name: str, wanted: str) -> None:
    saved(tmp_path, "Loreft", (1,))
    save_file(intervention("Loreft", 0)[0], tmp_path / f"{name}.safetensors")
    with pytest.raises(SpecError, match=wanted):
        import_reft(tmp_path, "edit", plant)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"bias": None}, "has not the tensors"),
        ({"rotate_layer": None}, "has not the tensors"),
        ({"more": torch.zeros(1)}, "no intervention has, 'more'"),
        ({"bias": torch.zeros(4)}, "shapes disagree"),
        ({"rotate_layer": torch.zeros(WIDTH, 2)}, "shapes disagree"),
        ({"bias": torch.full((RANK,), float("nan"))}, "NaN or Inf"),
    ],
)
def test_damaged_files_are_refused(plant: Plant, tmp_path: Path, change: dict[str, Any], wanted: str) -> None:
    saved(tmp_path, "Loreft", (1,))
    tensors = {k: v for k, v in ({**intervention("Loreft", 1)[0], **change}).items() if v is not None}
    save_file(tensors, tmp_path / f"{key(1)}.safetensors")
    with pytest.raises(ArtifactCorrupt, match=wanted):
        import_reft(tmp_path, "edit", plant)
    (tmp_path / f"{key(1)}.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ArtifactCorrupt):
        import_reft(tmp_path, "edit", plant)


def test_another_width_and_unequal_ranks_are_refused(plant: Plant, tmp_path: Path) -> None:
    saved(tmp_path, "Loreft")
    with pytest.raises(SpecError, match="tensors of width 16"):
        import_reft(tmp_path, "edit", Plant(tiny("llama", width=16), tiny_tokenizer()))
    narrow = {"weight": torch.zeros(1, WIDTH), "bias": torch.zeros(1), "rotate_layer": torch.eye(WIDTH)[:, :1].clone()}
    save_file(narrow, tmp_path / f"{key(1)}.safetensors")
    with pytest.raises(SpecError, match=r"one rank for all layers, got \[1, 3\]"):
        import_reft(tmp_path, "edit", plant)


def test_a_parametrisation_s_shape_is_checked_before_a_matrix_is_made_of_it(plant: Plant, tmp_path: Path) -> None:
    """A file of four megabytes would ask torch for one of four terabytes."""
    saved(tmp_path, "Direft", (1,))
    (path,) = tmp_path.glob("*.safetensors")
    whole = load_file(path)
    (original,) = (name for name in whole if name.endswith(".original"))
    for shape in ((10**6,), (2, 3, 4), (WIDTH, RANK + 1)):
        save_file({**whole, original: torch.zeros(shape)}, path)
        with pytest.raises(ArtifactCorrupt, match="shapes disagree"):
            import_reft(tmp_path, "edit", plant)


def test_a_configuration_without_end_is_not_read(plant: Plant, tmp_path: Path) -> None:
    saved(tmp_path, "Loreft")
    config = tmp_path / "config.json"
    config.write_text(config.read_text() + " " * 2**20)
    with pytest.raises(SpecError, match="does not tell"):
        import_reft(tmp_path, "edit", plant)
