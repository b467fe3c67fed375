"""Sparse autoencoders from published files: SAELens folders and Gemma Scope's archives, without pickle.

    SAELens       cfg.json, sae_weights.safetensors: W_enc (D, m), b_enc (m,), W_dec (m, D), b_dec (D,), threshold (m,)
                  of the architectures standard (ReLU) and jumprelu; hook name blocks.N.hook_resid_pre or _post
    Gemma Scope   params.npz with the same five arrays, always JumpReLU, at a block's output; which block stands in the
                  path, …/layer_20/…, or is told

Both become `steering.plan.sae`, equation (1): `apply_b_dec_to_input` is folded into the encoder's bias, decoder rows
are made unit vectors and their length is given to the activations, so that the function stays the same. Where the model
was loaded with `center_writing_weights`, its residuals have no mean over coordinates; the encoder then gets none
either, which reads the same from the plain model. Refused by name: other architectures and activations, normalisation
of each input, and that by a factor which the files do not tell.
What features do is not in such files: with `texts` their largest activations are measured on the model, on the first
texts of 65,536 tokens together.
Source: the layouts of SAELens's configuration and of Gemma Scope (arXiv:2408.05147), read, not copied.
Oracle: the encoder and decoder of the file applied as its configuration says.
"""

from __future__ import annotations

import json
import math
import re
import tokenize
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from steering.artifact import MAX_BYTES, MAX_HEADER, checked_name
from steering.errors import ArtifactCorrupt, SpecError
from steering.fit.autoencoder import Activity, fidelity, random_features
from steering.fit.concept import FitSettings, data_hash, encode_class
from steering.fit.examples import Example, checked_class
from steering.plan import MAX_RANK, Autoencoder, SaePlan
from steering.plan.sae import SaeTap
from steering.plant.capture import capture
from steering.plant.plant import Plant
from steering.types import Site

CONFIG, WEIGHTS, ARCHIVE = "cfg.json", "sae_weights.safetensors", "params.npz"
HOOK = re.compile(r"blocks\.(\d{1,4})\.hook_(resid_pre|resid_post)")
SITE = re.compile(r"(resid_pre|resid_post)\.(\d{1,4})")
IN_PATH = re.compile(r"layer_(\d{1,4})")
OTHER_SITE = re.compile(r"gemma-scope\S*-(att|mlp|transcoders)|embedding|transcoder")
MEASURED = 65_536
"""Most tokens of texts on which activations are measured: their states are held in memory together."""
UNREADABLE = (
    *(OSError, ValueError, EOFError, RuntimeError, OverflowError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError),
)
"""What a damaged archive makes zipfile, zlib and numpy's parser of headers raise."""
TENSORS = {"W_enc": 2, "b_enc": 1, "W_dec": 2, "b_dec": 1}
"""What every autoencoder has, and its dimensions."""


def is_autoencoder(folder: Path) -> bool:
    """Whether a folder has the files of one of the two layouts."""
    return (folder / CONFIG).is_file() or (folder / WEIGHTS).is_file() or (folder / ARCHIVE).is_file()


def import_sae(
    folder: Path, name: str, plant: Plant, *, site: str = "", texts: Sequence[Example] | None = None
) -> SaePlan:
    """A plan of one autoencoder from a folder of SAELens's or Gemma Scope's.

    site: `resid_post.20`, in place of what the folder says. texts: what activations are measured on. Raises SpecError
    for a folder or a setting that cannot be taken, ArtifactCorrupt for a damaged file.
    """
    checked_name(name)
    told = parse_site(site) if site else None
    if (folder / ARCHIVE).is_file():
        found, layout = _archive(folder / ARCHIVE), "gemma-scope"
        tap, layer = told or _site_of_path(folder)
        settings: Mapping[str, Any] = {}
        if "threshold" not in found:
            raise _unusable(folder / ARCHIVE, "it has no array 'threshold'")
    elif (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
        settings, layout = _config(folder / CONFIG), "saelens"
        tap, layer = told or _site_of_hook(settings)
        found = _safetensors(folder / WEIGHTS, settings["architecture"] == "jumprelu")
    else:
        expected = f"a folder with {CONFIG} and {WEIGHTS}, or with {ARCHIVE}"
        pickled = folder.is_dir() and any(folder.glob("*.pt"))
        advice = "the folder has .pt files, which are pickles: save them with SAELens's save_model" if pickled else ""
        raise SpecError("folder", expected=expected, got=folder.name, advice=advice)
    if layer >= plant.depth:
        raise SpecError("site", expected=f"layers in 0..{plant.depth - 1}", got=layer)
    ae = _autoencoder(found, settings, plant.width)
    return _plan(ae, name, plant, tap, layer, layout, texts)


def parse_site(text: str) -> tuple[SaeTap, int]:
    """(tap, layer) of `resid_post.20`. Raises SpecError."""
    match = SITE.fullmatch(text)
    if not match:
        raise SpecError("site", expected="a site such as resid_post.20 or resid_pre.8", got=text)
    return ("resid_pre" if match[1] == "resid_pre" else "resid_post"), int(match[2])


def _plan(
    ae: Autoencoder, name: str, plant: Plant, tap: SaeTap, layer: int, layout: str, texts: Sequence[Example] | None
) -> SaePlan:
    """The plan of one autoencoder, measured on texts where there are any."""
    m = len(ae.encoder)
    quality: dict[str, Any] = {}
    provenance: dict[str, Any] = {"imported": layout}
    known = {what: torch.zeros(1, m) for what in ("peak", "mean", "rate")}
    if texts is not None:
        rows = checked_class("texts", texts, least=1)
        encoded = _within(encode_class(plant, "texts", rows, FitSettings(skip=1)))
        place = Site(tap, layer)
        states = capture(plant, [ids for ids, _ in encoded], [place], [chosen for _, chosen in encoded])[place]
        x_ND = torch.cat(states)
        activity, measured = Activity.of(ae, x_ND), fidelity(ae, x_ND)
        known = {what: getattr(activity, what).float()[None] for what in known}
        quality = {
            "explained": [round(measured.explained, 4)],
            "active": [round(measured.active, 4)],
            "dead": [round(float((activity.rate == 0).double().mean()), 4)],
            "random": {"explained": [round(measured.random, 4)]},
        }
        if measured.explained <= measured.random:
            quality["warning"] = (
                "The autoencoder rebuilds the states of these texts no better than a random dictionary: it is likely "
                "another model's, or another site's."
            )
        provenance |= {"data": data_hash({"texts": rows}), "examples": {"texts": len(rows)}}
    plan = SaePlan(
        name=name,
        model=plant.fingerprint,
        depth=plant.depth,
        width=plant.width,
        quality=quality,
        provenance=provenance,
        tap=tap,
        measured="nothing" if texts is None else "texts",
        layers=(layer,),
        encoder=ae.encoder[None],
        encoder_bias=ae.encoder_bias[None],
        decoder=ae.decoder[None],
        decoder_bias=ae.decoder_bias[None],
        threshold=ae.threshold[None],
        scale=ae.scale[None],
        **known,
        selectivity=torch.zeros(1, m),
        control=random_features(known["rate"][0], 2 * MAX_RANK, seed=0).float()[None],
    )
    return SaePlan.from_artifact(plan.artifact())


def _within(rows: list[tuple[list[int], Sequence[int]]]) -> list[tuple[list[int], Sequence[int]]]:
    """The first of the encoded texts that together have at most `MEASURED` positions to read, one at least."""
    total = 0
    kept: list[tuple[list[int], Sequence[int]]] = []
    for row in rows:
        total += len(row[1])
        if kept and total > MEASURED:
            break
        kept.append(row)
    return kept


def _autoencoder(found: Mapping[str, Tensor], settings: Mapping[str, Any], width: int) -> Autoencoder:
    """Equation (1) of the plan from a file's tensors. Raises SpecError for another width or one that is too large."""
    D, m = found["W_enc"].shape
    if width != D:
        raise SpecError("folder", expected=f"an autoencoder of width {width}, the model's", got=D)
    if 8 * m * (D + 4) > MAX_BYTES:
        expected = f"an autoencoder of at most {MAX_BYTES // (8 * (D + 4))} features at width {D}: a gigabyte"
        raise SpecError("folder", expected=expected, got=m)
    W_mD = found["W_enc"].mT.contiguous()
    if settings.get("centred_model"):
        W_mD = W_mD - W_mD.mean(-1, keepdim=True)
    parts = {name: found[name].contiguous() for name in found if name != "W_enc"}
    return Autoencoder.of(
        W_mD,
        parts["b_enc"],
        parts["W_dec"],
        parts["b_dec"],
        parts.get("threshold"),
        centred=bool(settings.get("apply_b_dec_to_input")),
    )


def _config(file: Path) -> dict[str, Any]:
    """SAELens's configuration, what newer versions keep under `metadata` beside the rest. Raises SpecError."""
    try:
        if file.stat().st_size > MAX_HEADER:
            raise ValueError("too long")
        found = json.loads(file.read_text(encoding="utf-8"))
        known: dict[str, Any] = {**(found.get("metadata") or {}), **found}
        kwargs = known.get("model_from_pretrained_kwargs") or {}
        known["centred_model"] = bool(kwargs.get("center_writing_weights"))
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise SpecError("folder", expected=f"a {CONFIG} that is SAELens's configuration") from error
    known.setdefault("architecture", "standard")
    activation = known.get("activation_fn_str", known.get("activation_fn", "relu"))
    known.setdefault("apply_b_dec_to_input", True)  # it was always subtracted before it was a setting
    for name, got, allowed in (
        ("architecture", known["architecture"], ("standard", "jumprelu")),
        ("activation_fn", activation, ("relu",)),
        ("normalize_activations", known.get("normalize_activations") or "none", ("none", "False")),
        ("finetuning_scaling_factor", known.get("finetuning_scaling_factor") or False, (False,)),
        ("hook_head_index", known.get("hook_head_index"), (None,)),
        ("reshape_activations", known.get("reshape_activations") or "none", ("none",)),
    ):
        if got not in allowed:
            advice = ""
            if got in ("expected_average_only_in", True):
                advice = "fold the factor into the weights with SAELens's fold_activation_norm_scaling_factor, and save"
            expected = f"an autoencoder whose {name} is {' or '.join(map(str, allowed))}"
            raise SpecError("folder", expected=expected, got=got, advice=advice)
    return known


def _site_of_hook(settings: Mapping[str, Any]) -> tuple[SaeTap, int]:
    """(tap, layer) of a hook's name. Raises SpecError."""
    hook = settings.get("hook_name", settings.get("hook_point"))
    match = HOOK.fullmatch(hook) if isinstance(hook, str) else None
    if not match:
        raise SpecError("folder", expected="a hook blocks.N.hook_resid_pre or blocks.N.hook_resid_post", got=hook)
    return ("resid_pre" if match[2] == "resid_pre" else "resid_post"), int(match[1])


def _site_of_path(folder: Path) -> tuple[SaeTap, int]:
    """(resid_post, N) of a path with one part `layer_N`. Raises SpecError."""
    path = folder.resolve()
    found = [match for part in path.parts if (match := IN_PATH.fullmatch(part))]
    if len(found) != 1 or OTHER_SITE.search(str(path)):
        expected = "a site such as resid_post.20, for the folder's path names no layer_N of the residual stream"
        raise SpecError("site", expected=expected)
    return "resid_post", int(found[0][1])


def _safetensors(file: Path, jumps: bool) -> dict[str, Tensor]:
    """The tensors of SAELens's file. Raises ArtifactCorrupt."""
    try:
        with file.open("rb") as raw:
            header = int.from_bytes(raw.read(8), "little")
        if file.stat().st_size > 2 * MAX_BYTES or header > MAX_HEADER:
            raise _unusable(file, "it is too large")
        with safe_open(file, framework="pt") as tensors:
            wanted = [name for name in (*TENSORS, *(["threshold"] if jumps else [])) if name in tensors.keys()]  # noqa: SIM118
            # In float32, which numbers of eight bits grow fourfold to.
            if sum(4 * math.prod(tensors.get_slice(name).get_shape()) for name in wanted) > 2 * MAX_BYTES:
                raise _unusable(file, "it is too large")
            found = {name: tensors.get_tensor(name) for name in wanted}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise _unusable(file, "it is no safetensors file") from error
    return _checked(file, found, jumps)


def _archive(file: Path) -> dict[str, Tensor]:
    """The arrays of Gemma Scope's file, of numbers only. Raises ArtifactCorrupt."""
    found = {}
    try:
        with zipfile.ZipFile(file) as archive:
            sizes = {info.filename: info.file_size for info in archive.infolist()}
            names = (*TENSORS, "threshold")
            if sum(sizes.get(f"{name}.npy", 0) for name in names) > 2 * MAX_BYTES:  # unpacked: it may be one of zeros
                raise _unusable(file, "it is too large")
            for name in names:
                member = f"{name}.npy"
                if member not in sizes:
                    continue
                with archive.open(member) as raw:
                    _check_header(raw, sizes[member])  # type: ignore[arg-type]
                with archive.open(member) as raw:
                    array = np.lib.format.read_array(raw, allow_pickle=False)
                if array.dtype.kind != "f":
                    raise _unusable(file, f"its array {name!r} is not of real numbers")
                found[name] = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    except UNREADABLE as error:
        raise _unusable(file, "it is no archive of arrays") from error
    return _checked(file, found, "threshold" in found)


def _check_header(raw: BinaryIO, size: int) -> None:
    """Refuse an array whose header declares more numbers than the file has. Raises ValueError."""
    version = np.lib.format.read_magic(raw)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError("an unknown version")
    shape, _, dtype = read(raw)
    if dtype.hasobject or math.prod(shape) * dtype.itemsize > size:
        raise ValueError("an array that is larger than its file")


def _checked(file: Path, found: dict[str, Tensor], jumps: bool) -> dict[str, Tensor]:
    """`found` if its tensors fit each other. Raises ArtifactCorrupt."""
    for name in (*TENSORS, *(["threshold"] if jumps else [])):
        if name not in found:
            raise _unusable(file, f"it has no tensor {name!r}")
    if any(found[name].ndim != n for name, n in TENSORS.items()):
        raise _unusable(file, "its shapes disagree")
    D, m = found["W_enc"].shape
    shapes = {"b_enc": (m,), "W_dec": (m, D), "b_dec": (D,), "threshold": (m,)}
    if not m or any(found[name].shape != shape for name, shape in shapes.items() if name in found):
        raise _unusable(file, "its shapes disagree")
    if not all(tensor.is_floating_point() for tensor in found.values()):
        raise _unusable(file, "it holds what is no finite number")
    found = {name: tensor.float() for name, tensor in found.items()}  # formats of eight bits have no test of their own
    if not all(bool(tensor.isfinite().all()) for tensor in found.values()):
        raise _unusable(file, "it holds what is no finite number")
    return found


def _unusable(file: Path, why: str) -> ArtifactCorrupt:
    return ArtifactCorrupt(f"File {file.name[:80]!r} cannot be used: {why}.", param="folder")
