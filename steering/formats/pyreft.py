"""ReFT plans from pyreft's files: safetensors only.

pyreft keeps a file for each intervention, `intkey_layer.L.comp.block_output.unit.pos.nunit.1#0` (newer versions write
`_` for `.`), beside `config.json`.
Its `.bin` files are pickles, which can run code when they are opened, so they are refused: the same tensors, saved with
safetensors under the same names and the suffix `.safetensors`, are taken. In such a file

    LoReFT   weight (r, D), bias (r,), rotate_layer (D, r)
    DiReFT   learned_source.weight, learned_source.bias, and of the orthogonal parametrisation
             rotate_layer.parametrizations.weight.original (D, r) and .0.base; or rotate_layer.weight (D, r)
    NoReFT, NoDiReFT   learned_source.weight, learned_source.bias, proj_layer.weight (r, D)

Which of the two forms it is stands in `config.json` (`intervention_types`), for the tensors do not tell.
Source: the layout of pyreft's `interventions.py` and of pyvene's `save`, read, not copied.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from steering.artifact import MAX_BYTES, MAX_HEADER, checked_name
from steering.errors import ArtifactCorrupt, SpecError
from steering.plan import Form, ReftPlan, is_orthonormal
from steering.plant.plant import Plant

KEY = re.compile(r"intkey_layer[._](\d{1,4})[._]comp[._]([a-z_]+)[._]unit[._]pos[._]nunit[._]1#0")
ORTHOGONAL = "rotate_layer.parametrizations.weight"
_FORMS: dict[str, Form] = {"LoreftIntervention": "loreft", "NoreftIntervention": "loreft"}
_FORMS |= {"DireftIntervention": "direft", "NodireftIntervention": "direft"}


def import_reft(folder: Path, name: str, plant: Plant, *, positions: str = "", form: Form | None = None) -> ReftPlan:
    """A plan from a folder of pyreft's, converted to safetensors.

    positions: those of the training, as pyreft writes them (`f7+l7`, `l1`); empty where they are not known. form: in
    place of what `config.json` says. Raises SpecError for a folder, a file or a setting that cannot be taken, and
    ArtifactCorrupt for a damaged file.
    """
    checked_name(name)
    first, last = parse_positions(positions)
    files = sorted(folder.glob("intkey_*.safetensors")) if folder.is_dir() else []
    if not files:
        pickled = folder.is_dir() and any(folder.glob("intkey_*.bin"))
        advice = "the folder has .bin files, which are pickles: save their tensors with safetensors" if pickled else ""
        raise SpecError("folder", expected="a folder with intkey_*.safetensors files", got=folder.name, advice=advice)
    form = _form(folder) if form is None else form
    parts = dict(sorted((_layer(file, plant.depth), _tensors(file, plant.width)) for file in files))
    if len(parts) < len(files):
        raise SpecError("folder", expected="one intervention a layer: weights that first and last positions share")
    ranks = {len(bias_R) for *_, bias_R in parts.values()}
    if len(ranks) > 1:
        raise SpecError("folder", expected="one rank for all layers", got=sorted(ranks))
    rotation = torch.stack([R_RD for R_RD, *_ in parts.values()])
    plan = ReftPlan(
        name=name,
        model=plant.fingerprint,
        depth=plant.depth,
        width=plant.width,
        quality={},
        provenance={"imported": "pyreft"},
        layers=tuple(parts),
        form=form,
        is_rotation=all(is_orthonormal(R_RD) for R_RD in rotation),
        first=first,
        last=last,
        rotation=rotation,
        weight=torch.stack([W_RD for _, W_RD, _ in parts.values()]),
        bias=torch.stack([b_R for *_, b_R in parts.values()]),
    )
    return ReftPlan.from_artifact(plan.artifact())


def parse_positions(text: str) -> tuple[int, int]:
    """(first, last) of `f7+l7`, `f3` or `l1`; (0, 0) for an empty text. Raises SpecError."""
    match = re.fullmatch(r"(?:f(\d{1,4}))?(?:\+(?=l))?(?:l(\d{1,4}))?", text)
    if not match or (text and not any(match.groups())) or text.startswith("+"):
        raise SpecError("positions", expected="positions as pyreft writes them, f7+l7", got=text)
    return int(match[1] or 0), int(match[2] or 0)


def _form(folder: Path) -> Form:
    """The form that `config.json` tells. Raises SpecError where it tells none, or several, or one that is no law."""
    try:
        if (folder / "config.json").stat().st_size > MAX_HEADER:
            raise ValueError("too long")
        config: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        names = {str(entry).rstrip("'>").rpartition(".")[2] for entry in config["intervention_types"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SpecError("form", expected="loreft or direft, for config.json does not tell") from error
    forms = {_FORMS.get(name) for name in names}
    found = next(iter(forms)) if len(forms) == 1 else None
    if found is None:
        raise SpecError("form", expected=f"interventions of one form, of {', '.join(_FORMS)}", got=sorted(names))
    return found


def _layer(file: Path, depth: int) -> int:
    """The block that a file is for. Raises SpecError for a name of another layout, or a block the model lacks."""
    match = KEY.fullmatch(file.name.removesuffix(".safetensors"))
    if not match or match[2] != "block_output":
        expected = "files intkey_layer.L.comp.block_output.unit.pos.nunit.1#0.safetensors"
        raise SpecError("folder", expected=expected, got=file.name)
    if int(match[1]) >= depth:
        raise SpecError("folder", expected=f"layers in 0..{depth - 1}", got=int(match[1]))
    return int(match[1])


def _tensors(file: Path, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """R (r, D), W (r, D), b (r,) of one file, float32. Raises ArtifactCorrupt, SpecError for another width."""
    found = read_tensors(file)
    source = "learned_source." if "learned_source.weight" in found else ""
    try:
        W_RD, b_R = found.pop(f"{source}weight"), found.pop(f"{source}bias")
        if "proj_layer.weight" in found:
            R_RD = found.pop("proj_layer.weight")
        elif f"{ORTHOGONAL}.original" in found:
            base = found.pop(f"{ORTHOGONAL}.0.base", None)
            original = found.pop(f"{ORTHOGONAL}.original")
            if original.shape != W_RD.mT.shape:  # before a matrix is made of its shape
                raise unusable(file, "its shapes disagree")
            R_RD = _orthogonal(original, base).mT
        else:
            R_RD = found.pop("rotate_layer" if "rotate_layer" in found else "rotate_layer.weight").mT
    except (KeyError, RuntimeError) as error:
        raise unusable(file, "it has not the tensors of an intervention") from error
    if found:
        raise unusable(file, f"it has a tensor that no intervention has, {min(found)[:64]!r}")
    if W_RD.ndim != 2 or R_RD.shape != W_RD.shape or b_R.shape != W_RD.shape[:1]:
        raise unusable(file, "its shapes disagree")
    if W_RD.shape[1] != width:
        raise SpecError("folder", expected=f"tensors of width {width}, the model's", got=W_RD.shape[1])
    if not all(bool(t.isfinite().all()) for t in (R_RD, W_RD, b_R)):
        raise unusable(file, "it holds NaN or Inf")
    return R_RD.contiguous(), W_RD.contiguous(), b_R.contiguous()


def _orthogonal(original_DR: Tensor, base_DD: Tensor | None) -> Tensor:
    """The matrix (D, r) that torch's orthogonal parametrisation makes of what it stores."""
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.eye(*original_DR.shape))
    nn.utils.parametrizations.orthogonal(layer, use_trivialization=base_DD is not None)
    state = {"parametrizations.weight.original": original_DR}
    if base_DD is not None:
        state["parametrizations.weight.0.base"] = base_DD
    layer.load_state_dict(state)
    with torch.no_grad():
        made: Tensor = layer.weight.detach().clone()
    return made


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file in float32. Raises ArtifactCorrupt."""
    try:
        with file.open("rb") as raw:
            header = int.from_bytes(raw.read(8), "little")
        if file.stat().st_size > MAX_BYTES or header > MAX_HEADER:
            raise unusable(file, "it is too large")
        found: dict[str, Tensor] = {}
        held = 0
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a mapping)
                # In float32, which numbers of eight bits grow fourfold to: no artifact may hold more.
                held += 4 * math.prod(tensors.get_slice(key).get_shape())
                if held > MAX_BYTES:
                    raise unusable(file, "it is too large")
                tensor = tensors.get_tensor(key)
                if not tensor.is_floating_point():
                    raise unusable(file, f"{key[:64]!r} is not of real numbers")
                found[key] = tensor.float()
        return found
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise unusable(file, "it is no safetensors file") from error


def unusable(file: Path, why: str) -> ArtifactCorrupt:
    """The error of a file that cannot be taken."""
    return ArtifactCorrupt(f"File {file.name[:80]!r} cannot be used: {why}.", param="folder")
