"""GGUF control vectors: what llama.cpp, repeng and EasySteer exchange, read into concepts and written from them.

    direction.N (D,)  is added to the output of block N                            x_{N+1} ← x_{N+1} + a · direction.N

so that `direction.N` is the contrast E_{N+1} of a concept. A file has nothing else to say of a concept, and what is
missing follows from one assumption, A = I (a block carries a direction through unchanged):

    v_{N+1} = direction.N / ‖direction.N‖,  ‖E_{N+1}‖ = ‖direction.N‖;     before the first vector v_N = v_{N+1}
    origin = 0, since the file knows no mean;  gains `identity`

A setpoint of an imported concept in units `centred` is therefore the same as in `contrast`: 0 is the origin of the
residual stream and 1 a projection of ‖direction.N‖, not the means of any examples. The concept controls the longest run
of consecutive N; vectors outside it stay in the artifact and are reached by naming `layers`. The vectors themselves are
kept as well (tensor `vectors`), so that they are exported bit for bit as they came.

llama.cpp takes N ≥ 1 only, reads no metadata and refuses a file with `direction.0`, which EasySteer writes: it is read,
and left out of exports. Of the metadata `controlvector.model_hint` is compared where it names an architecture, and
`controlvector.layer_count`, which some writers take for the model's blocks and others for the vectors, only bounds.

A file may come from anybody: the header is walked with bounds on everything in it before the `gguf` package reads it.
"""

from __future__ import annotations

import re
import struct
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steering.artifact import Artifact, checked_name
from steering.concept import KIND, Concept
from steering.control import Weights, identity_gains
from steering.errors import ArtifactCorrupt, SpecError, StaleFingerprint

if TYPE_CHECKING:
    from steering.plant.plant import Plant

MAGIC = b"GGUF"
ARCHITECTURE = "controlvector"
MAX_HEADER = 2**20
"""Longest header, in bytes."""
MAX_ENTRIES = 4096
"""Most keys, tensors, and elements of an array."""
MAX_ALIGNMENT = 4096
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of the scalar types of a key's value, by their number."""
_STRING, _ARRAY, _UINT32 = 8, 9, 4
_NUMBERS = {0: 4, 1: 2, 30: 2}
"""Bytes of the number formats that a direction may have: float32, float16, bfloat16."""
_DIRECTION = re.compile(r"direction\.(0|[1-9][0-9]{0,3})")
_HINTS: Mapping[str, tuple[str, ...]] = {
    "mistral": ("mistral", "llama"),
    "mixtral": ("mixtral", "llama"),
    "gpt_neox": ("gpt_neox", "gptneox"),
    "gemma3_text": ("gemma3_text", "gemma3"),
}
"""The names of an architecture where GGUF's differs from transformers': of several, GGUF's is the last."""


@dataclass(frozen=True)
class Target:
    """The model that a control vector is for."""

    model: str
    """Its fingerprint."""
    depth: int
    width: int
    architecture: str
    """`config.model_type`, as transformers names it."""

    @classmethod
    def of(cls, plant: Plant) -> Target:
        """A loaded model."""
        return cls(plant.fingerprint, plant.depth, plant.width, str(plant.model.config.get_text_config().model_type))

    @property
    def hints(self) -> tuple[str, ...]:
        """What `controlvector.model_hint` may say for this model; the last is what is written."""
        return _HINTS.get(self.architecture, (self.architecture,))


@dataclass(frozen=True, eq=False)
class ControlVectors:
    """A file's vectors: N → (D,) float32, all of one width; `hint` is "" and `declared` None where it is silent."""

    vectors: Mapping[int, Tensor]
    hint: str = ""
    declared: int | None = None

    @property
    def width(self) -> int:
        """D."""
        return int(next(iter(self.vectors.values())).shape[0])


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_vectors(path: Path) -> ControlVectors:
    """The control vectors of a GGUF file. Raises ArtifactCorrupt, which says what is wrong with it."""
    import gguf

    _check_header(path)
    try:
        reader = gguf.GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
        found: dict[int, Tensor] = {}
        for tensor in reader.tensors:
            numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            found[int(tensor.name.partition(".")[2])] = torch.from_numpy(numbers.astype("float32").reshape(-1).copy())
    except (ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        raise _corrupt("it cannot be read") from error
    kind = fields.get("general.architecture", ARCHITECTURE)
    if kind != ARCHITECTURE:
        raise _corrupt(f"its general.architecture is {str(kind)[:40]!r}, expected {ARCHITECTURE!r}")
    if not all(vector.double().norm() <= torch.finfo(torch.float32).max for vector in found.values()):
        raise _corrupt("it holds NaN, Inf or a vector whose norm is beyond float32")
    if len({vector.shape for vector in found.values()}) > 1:
        raise _corrupt("its vectors differ in width")
    if not any(vector.any() for vector in found.values()):
        raise _corrupt("it holds no direction.N that is not zero")
    hint, declared = fields.get("controlvector.model_hint", ""), fields.get("controlvector.layer_count")
    if not isinstance(hint, str) or isinstance(declared, bool) or not isinstance(declared, int | None):
        raise _corrupt("its metadata has wrong types")
    return ControlVectors(dict(sorted(found.items())), hint, declared)


def imported(file: ControlVectors, name: str, target: Target) -> Artifact:
    """A file's vectors as a concept of `target`, by the module's equations, ready to be saved.

    Raises SpecError for a bad name, StaleFingerprint for another architecture, width or number of layers, both told.
    """
    checked_name(name)
    _require_fit(file, target)
    direction = torch.zeros(target.depth + 1, target.width)
    magnitude = torch.zeros(target.depth + 1)
    for block, vector in file.vectors.items():
        norm = vector.double().norm()
        if norm > 0:
            direction[block + 1] = (vector.double() / norm).float()
            magnitude[block + 1] = norm.float()
    run = _longest_run([block for block, vector in file.vectors.items() if vector.any()])
    first, last = run[0], run[-1]
    if not direction[first].any():
        direction[first], magnitude[first] = direction[first + 1], magnitude[first + 1]
    weights = Weights()
    gain = torch.zeros(target.depth, target.width)
    gain[first : last + 1] = identity_gains(direction[first : last + 2], weights).float()
    origin = {
        "format": "gguf",
        "model_hint": file.hint[:64],
        "layer_count": file.declared,
        "layers": list(file.vectors),
        "outside": [block for block in file.vectors if block not in run],
    }
    concept = Concept(
        name,
        target.model,
        direction,
        magnitude,
        torch.zeros(target.depth + 1),
        {"identity": gain},
        run,
        weights,
        "identity",
        {},
        {"imported": origin},
    )
    whole = concept.artifact()
    return replace(whole, tensors={**whole.tensors, "vectors": torch.stack(list(file.vectors.values()))})


def exported(artifact: Artifact, architecture: str) -> bytes:
    """A concept as a GGUF file: `direction.N` for N ≥ 1, of an imported one the very vectors that came.

    `architecture` is the hint for concepts that carry none. Raises SpecError for an artifact without such vectors,
    ArtifactCorrupt for one that is not whole.
    """
    import gguf

    vectors, hint = vectors_of(artifact), hint_of(artifact)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vectors.gguf"
        writer = gguf.GGUFWriter(path, ARCHITECTURE)
        writer.add_string("controlvector.model_hint", hint or architecture)
        writer.add_uint32("controlvector.layer_count", len(vectors))
        for block, vector in vectors.items():
            writer.add_tensor(f"direction.{block}", vector.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def vectors_of(artifact: Artifact) -> dict[int, Tensor]:
    """The vectors (D,) float32 of a concept by block N ≥ 1, those that are zero left out. Raises as `exported`."""
    if artifact.kind != KIND:
        raise SpecError("format", expected=f"safetensors, since GGUF holds a {KIND} only", got=artifact.kind)
    concept = Concept.from_artifact(artifact)
    if (kept := artifact.tensors.get("vectors")) is None:
        rows = concept.direction * concept.magnitude[:, None]
        found = {block: rows[block + 1].contiguous() for block in range(concept.depth)}
    else:
        found = dict(zip(_blocks(artifact, concept, kept), kept.contiguous(), strict=True))
    found = {block: vector for block, vector in found.items() if block > 0 and vector.any()}
    if not found:
        raise SpecError("format", expected="safetensors, since this concept has no vector behind block 0")
    return found


def hint_of(artifact: Artifact) -> str:
    """The architecture that an imported concept's file named; "" for any other artifact."""
    hint = _origin(artifact).get("model_hint")
    return hint if isinstance(hint, str) else ""


def _origin(artifact: Artifact) -> Mapping[str, Any]:
    provenance = artifact.body.get("provenance")
    origin = provenance.get("imported") if isinstance(provenance, Mapping) else None
    return origin if isinstance(origin, Mapping) else {}


def _blocks(artifact: Artifact, concept: Concept, kept: Tensor) -> list[int]:
    """The blocks of an imported concept's vectors. Raises ArtifactCorrupt where the two disagree."""
    blocks = _origin(artifact).get("layers")
    if (
        not isinstance(blocks, list)
        or kept.dtype != torch.float32
        or kept.shape != (len(blocks), concept.width)
        or not all(type(block) is int and 0 <= block < concept.depth for block in blocks)
        or len(set(blocks)) < len(blocks)
    ):
        raise ArtifactCorrupt(f"Artifact {artifact.name!r} is not a whole import; import it again.", param="name")
    return list(blocks)


def _require_fit(file: ControlVectors, target: Target) -> None:
    """Raises StaleFingerprint unless the vectors may be for this model."""
    hint = file.hint.lower()
    if hint not in target.hints and hint in _architectures():
        what, theirs, ours = "for architecture", repr(hint), repr(target.hints[-1])
    elif file.width != target.width:
        what, theirs, ours = "of width", str(file.width), str(target.width)
    elif (highest := max(file.vectors)) >= target.depth:
        what, theirs, ours = "up to block", str(highest), f"{target.depth - 1}, the last of {target.depth} layers"
    elif (file.declared or 0) > target.depth:
        what, theirs, ours = "for layers in the number of", str(file.declared), str(target.depth)
    else:
        return
    raise StaleFingerprint(
        f"The control vectors are {what} {theirs}, this model has {ours}: import those that were made for this model.",
        param="name",
    )


def _architectures() -> set[str]:
    """Every name of an architecture that a hint may be taken for."""
    import gguf

    from steering.plant.layouts import LAYOUTS

    return {*gguf.MODEL_ARCH_NAMES.values(), *LAYOUTS}


def _longest_run(blocks: Sequence[int]) -> tuple[int, ...]:
    """The longest run of consecutive numbers, the first of several. `blocks` ascend."""
    breaks = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(blocks)) if b != a + 1), len(blocks)]
    return max((tuple(blocks[a:b]) for a, b in pairwise(breaks)), key=len)


class _Walk:
    """A cursor over a header. Everything that it reads is bounded by the bytes there are."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.at = 0

    def skip(self, count: int) -> bytes:
        if count > len(self.raw) - self.at:
            raise _corrupt(f"its header is not whole, or longer than {MAX_HEADER} bytes")
        self.at += count
        return self.raw[self.at - count : self.at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.skip(size), "little")

    def text(self) -> str:
        try:
            return self.skip(self.number(8)).decode()
        except UnicodeDecodeError as error:
            raise _corrupt("a name in its header is not UTF-8") from error

    def count(self, what: str) -> int:
        found = self.number(8)
        if found > MAX_ENTRIES:
            raise _corrupt(f"it has more than {MAX_ENTRIES} {what}")
        return found

    def value(self, kind: int) -> None:
        if kind == _STRING:
            self.text()
        elif kind == _ARRAY:
            inner, length = self.number(4), self.count("elements in an array")
            if inner == _ARRAY:
                raise _corrupt("its metadata has arrays of arrays")
            for _ in range(length):
                self.value(inner)
        elif kind in _SCALARS:
            self.skip(_SCALARS[kind])
        else:
            raise _corrupt("its metadata has a value of an unknown type")


def _check_header(path: Path) -> None:
    """Walk a file's header. Raises ArtifactCorrupt unless it is short, names every thing once, and covers the file."""
    with path.open("rb") as file:
        walk = _Walk(file.read(MAX_HEADER))
    if walk.skip(4) != MAGIC or walk.number(4) not in (2, 3):
        raise _corrupt("it is not a little-endian GGUF file of version 2 or 3")
    n_tensors, n_keys = walk.count("tensors"), walk.count("keys")
    alignment, keys = 32, set()
    for _ in range(n_keys):
        key, kind = walk.text(), walk.number(4)
        if key == "general.alignment" and kind == _UINT32:
            (alignment,) = struct.unpack("<I", walk.skip(4))
        else:
            walk.value(kind)
        keys.add(key)
    if len(keys) < n_keys:
        raise _corrupt("a key stands twice")
    if not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise _corrupt("its alignment is absurd")
    spans, names = [], set()
    for _ in range(n_tensors):
        name = walk.text()
        if not _DIRECTION.fullmatch(name):
            raise _corrupt(f"it has a tensor named {name[:40]!r} where direction.N was expected")
        if walk.number(4) != 1:
            raise _corrupt(f"{name} is not a vector")
        length, kind, start = walk.number(8), walk.number(4), walk.number(8)
        if kind not in _NUMBERS:
            raise _corrupt(f"{name} is neither float32 nor float16 nor bfloat16")
        spans.append((start, start + length * _NUMBERS[kind]))
        names.add(name)
    if len(names) < n_tensors:
        raise _corrupt("a tensor stands twice")
    _check_spans(sorted(spans), path.stat().st_size - walk.at, -walk.at % alignment, alignment)


def _check_spans(spans: Sequence[tuple[int, int]], size: int, padding: int, alignment: int) -> None:
    """Raises ArtifactCorrupt unless the tensors lie side by side and fill the `size` bytes behind the header."""
    at = 0
    for start, end in spans:
        if not at <= start < at + alignment or start % alignment or end <= start:
            raise _corrupt("its tensors overlap, are empty, or leave gaps")
        at = end
    if not at <= size - padding < at + alignment:
        raise _corrupt(f"it has {max(size - padding, 0)} bytes of numbers where its header declares {at}")


def _corrupt(why: str) -> ArtifactCorrupt:
    return ArtifactCorrupt(f"The GGUF file cannot be used: {why}.", param="name")
