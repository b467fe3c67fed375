"""Control vectors: what the `gguf` package wrote is read as it was, comes back bit for bit, and damage is refused."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from steering.artifact import Artifact
from steering.concept import Concept
from steering.control import Weights, scalar_gains
from steering.errors import ArtifactCorrupt, SpecError, StaleFingerprint
from steering.formats.gguf import Target, exported, hint_of, imported, is_gguf, read_vectors, vectors_of
from steering.methods import Add, Lqr, compile_program
from steering.plant.massive import Caution
from steering.types import across
from tests.toy import MODEL, toy

DEPTH, WIDTH = 6, 8
LLAMA = Target(MODEL, DEPTH, WIDTH, "llama")


def vectors(*blocks: int, width: int = WIDTH) -> dict[int, np.ndarray]:
    generator = np.random.default_rng(len(blocks))
    return {block: 3 * generator.standard_normal(width).astype(np.float32) for block in blocks}


def write(path: Path, given: Mapping[int, np.ndarray], hint: str | None = "llama", **fields: int) -> Path:
    """A file as repeng writes it."""
    writer = gguf.GGUFWriter(path, "controlvector")
    if hint is not None:
        writer.add_string("controlvector.model_hint", hint)
    writer.add_uint32("controlvector.layer_count", fields.pop("layer_count", len(given)))
    for key, value in fields.items():
        writer.add_uint32(f"controlvector.{key}", value)
    for block, vector in given.items():
        writer.add_tensor(f"direction.{block}", vector)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def reread(content: bytes, folder: Path) -> gguf.GGUFReader:
    path = folder / "out.gguf"
    path.write_bytes(content)
    return gguf.GGUFReader(path)


class Bench:
    depth, width, caution = DEPTH, WIDTH, Caution()

    def __init__(self, concept: Concept) -> None:
        self._concept = concept

    def concept(self, name: str) -> Concept:
        return self._concept


def test_the_vectors_come_back_bit_for_bit(tmp_path: Path) -> None:
    given = vectors(*range(1, DEPTH))
    found = imported(read_vectors(write(tmp_path / "a.gguf", given)), "joy", LLAMA)
    stored = Artifact.load(found.save(tmp_path))
    reader = reread(exported(stored, "other"), tmp_path)
    assert {t.name: t.data.tobytes() for t in reader.tensors} == {
        f"direction.{block}": vector.tobytes() for block, vector in given.items()
    }
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "llama"
    assert fields["controlvector.layer_count"] == DEPTH - 1
    again = imported(read_vectors(tmp_path / "out.gguf"), "joy", LLAMA)
    assert again.fingerprint == found.fingerprint


def test_a_vector_acts_where_llama_cpp_adds_it(tmp_path: Path) -> None:
    """`direction.N` at the output of block N: the law that writes there adds a multiple of that very vector."""
    given = vectors(1, 2, 3, 4, 5)
    concept = Concept.from_artifact(imported(read_vectors(write(tmp_path / "a.gguf", given)), "joy", LLAMA))
    assert concept.layers == (1, 2, 3, 4, 5)
    term = compile_program([Add(concept="joy", strength=5.0)], Bench(concept)).terms[0]
    for block, vector in given.items():
        law = term.laws[across(block)]
        state = torch.zeros(1, WIDTH)
        pushed = law(state, state)[0]
        torch.testing.assert_close(pushed, torch.from_numpy(vector), rtol=1e-5, atol=1e-6)


def test_what_the_file_does_not_say(tmp_path: Path) -> None:
    """Unit directions with the vectors' norms, no origin, gains of A = I, and the first vector on both sides of its
    block."""
    given = vectors(2, 3)
    concept = Concept.from_artifact(imported(read_vectors(write(tmp_path / "a.gguf", given)), "joy", LLAMA))
    first, second = (torch.from_numpy(given[block]) for block in (2, 3))
    assert not concept.origin.any()
    assert not concept.direction[:2].any()
    assert not concept.direction[5:].any()
    for state, vector in ((2, first), (3, first), (4, second)):
        torch.testing.assert_close(concept.direction[state], vector / vector.norm())
        assert float(concept.magnitude[state]) == pytest.approx(float(vector.norm()), rel=1e-6)
    assert concept.default_gains == "identity"
    expected = scalar_gains(2, Weights())[:, None].float() * concept.direction[2:4]
    torch.testing.assert_close(concept.gain()[2:4], expected)
    assert not concept.gain()[[0, 1, 4, 5]].any()
    assert concept.provenance["imported"]["layers"] == [2, 3]
    term = compile_program([Lqr(concept="joy", setpoint=1.0)], Bench(concept)).terms[0]
    assert sorted(route.read.layer for route in term.laws) == [2, 3]
    centred, contrast = (
        compile_program([Lqr(concept="joy", setpoint=1.5, units=units)], Bench(concept)).fingerprint
        for units in ("centred", "contrast")
    )
    laws = [
        compile_program([Lqr(concept="joy", setpoint=1.5, units=units)], Bench(concept)).laws[across(2)].setpoint
        for units in ("centred", "contrast")
    ]
    assert torch.equal(*laws)
    assert centred != contrast  # they say different things of what they measure


def test_a_fitted_concept_is_exported_as_its_contrast(tmp_path: Path) -> None:
    concept = toy(DEPTH, WIDTH).resident().tone
    reader = reread(exported(concept.artifact(), "qwen2"), tmp_path)
    found = {t.name: torch.from_numpy(np.array(t.data)) for t in reader.tensors}
    assert list(found) == [f"direction.{block}" for block in range(1, DEPTH)]
    for block in range(1, DEPTH):
        contrast = concept.magnitude[block + 1] * concept.direction[block + 1]
        assert torch.equal(found[f"direction.{block}"], contrast)
    assert reader.fields["controlvector.model_hint"].contents() == "qwen2"


def test_vectors_apart_are_kept_and_named(tmp_path: Path) -> None:
    given = vectors(0, 2, 3, 5)
    given[4] = np.zeros(WIDTH, np.float32)
    found = imported(read_vectors(write(tmp_path / "a.gguf", given)), "joy", LLAMA)
    concept = Concept.from_artifact(found)
    assert concept.layers == (2, 3)
    assert concept.provenance["imported"]["outside"] == [0, 4, 5]
    assert torch.equal(concept.direction[6] * 0, torch.zeros(WIDTH))
    assert concept.direction[6].any()
    assert sorted(vectors_of(found)) == [2, 3, 5]  # llama.cpp refuses a file with direction.0, and zeros say nothing


def test_a_single_vector_of_the_last_block_can_be_controlled(tmp_path: Path) -> None:
    concept = Concept.from_artifact(
        imported(read_vectors(write(tmp_path / "a.gguf", vectors(DEPTH - 1), layer_count=DEPTH)), "joy", LLAMA)
    )
    assert concept.layers == (DEPTH - 1,)
    for one in (Lqr(concept="joy", setpoint=1.0), Add(concept="joy")):
        assert compile_program([one], Bench(concept)).acts


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_number_formats(tmp_path: Path, dtype: type) -> None:
    given = {1: np.arange(1, WIDTH + 1).astype(dtype)}
    assert torch.equal(read_vectors(write(tmp_path / "a.gguf", given)).vectors[1], torch.arange(1.0, WIDTH + 1))


@pytest.mark.parametrize(
    ("architecture", "hint", "fits"),
    [
        ("llama", "llama", True), ("llama", "qwen2", False), ("llama", "mistral", False), ("mistral", "llama", True),
        ("mistral", "mistral", True), ("gpt_neox", "gptneox", True), ("llama", "some/model-of-mine", True),
        ("llama", None, True),
    ],
)  # fmt: skip
def test_a_hint_that_names_another_architecture_is_refused(
    tmp_path: Path, architecture: str, hint: str | None, fits: bool
) -> None:
    file = read_vectors(write(tmp_path / "a.gguf", vectors(1, 2), hint))
    target = Target(MODEL, DEPTH, WIDTH, architecture)
    if fits:
        assert hint_of(imported(file, "joy", target)) == (hint or "")
        return
    with pytest.raises(StaleFingerprint, match=f"{hint}.*{target.hints[-1]}"):
        imported(file, "joy", target)


@pytest.mark.parametrize(
    ("given", "count", "said"),
    [
        (vectors(1, 2, width=WIDTH + 1), 2, "of width 9, this model has 8"),
        (vectors(1, DEPTH), 2, "up to block 6, this model has 5, the last of 6 layers"),
        (vectors(1), DEPTH + 1, "in the number of 7, this model has 6"),
    ],
    ids=["width", "block", "count"],
)
def test_another_models_sizes_are_told(tmp_path: Path, given: dict[int, np.ndarray], count: int, said: str) -> None:
    with pytest.raises(StaleFingerprint, match=said):
        imported(read_vectors(write(tmp_path / "a.gguf", given, layer_count=count)), "joy", LLAMA)


def test_a_name_is_checked(tmp_path: Path) -> None:
    file = read_vectors(write(tmp_path / "a.gguf", vectors(1)))
    with pytest.raises(SpecError):
        imported(file, "../joy", LLAMA)


def test_only_whole_concepts_are_exported(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        exported(Artifact("p", "plan", MODEL, {}), "llama")
    assert caught.value.param == "format"
    found = imported(read_vectors(write(tmp_path / "a.gguf", vectors(1, 2))), "joy", LLAMA)
    for wrong in (torch.zeros(1, WIDTH), torch.zeros(2, WIDTH + 1), torch.zeros(2, WIDTH, dtype=torch.float64)):
        forged = Artifact("joy", found.kind, MODEL, {**found.tensors, "vectors": wrong}, found.body)
        with pytest.raises(ArtifactCorrupt):
            exported(forged, "llama")
    only_zero = imported(read_vectors(write(tmp_path / "b.gguf", vectors(0))), "joy", LLAMA)
    with pytest.raises(SpecError, match="block 0"):
        exported(only_zero, "llama")


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(tensors: int = 1, keys: int = 0, body: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + body


def tensor(name: str = "direction.1", shape: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dims + struct.pack("<IQ", kind, offset)


def padded(head: bytes, data: bytes = struct.pack("<8f", *range(1, 9))) -> bytes:
    return head + bytes(-len(head) % 32) + data


KEY, STRING = text("controlvector.model_hint"), struct.pack("<I", 8)
BAD: dict[str, bytes] = {
    "empty": b"",
    "magic alone": b"GGUF",
    "version": padded(header(body=tensor(), version=7)),
    "a bomb of keys": header(keys=2**60),
    "a bomb of tensors": header(tensors=2**60),
    "no tensors": padded(header(tensors=0), b""),
    "a name beyond the file": header(body=struct.pack("<Q", 2**63)),
    "a name that is no text": header(body=struct.pack("<Q", 2) + b"\xff\xfe" + bytes(99)),
    "an array without end": padded(header(keys=1, body=KEY + struct.pack("<IIQ", 9, 0, 2**62) + tensor())),
    "arrays of arrays": padded(header(keys=1, body=KEY + struct.pack("<IIQ", 9, 9, 1) + bytes(64) + tensor())),
    "a value of no type": padded(header(keys=1, body=KEY + struct.pack("<I", 99) + tensor())),
    "a hint that is a number": padded(header(keys=1, body=KEY + struct.pack("<II", 4, 1) + tensor())),
    "a key twice": padded(header(keys=2, body=2 * (KEY + STRING + text("llama")) + tensor())),
    "alignment": padded(header(keys=1, body=text("general.alignment") + struct.pack("<II", 4, 3) + tensor())),
    "a model": padded(header(keys=1, body=text("general.architecture") + STRING + text("llama") + tensor())),
    "another tensor": padded(header(body=tensor("token_embd.weight"))),
    "a number with a zero before": padded(header(body=tensor("direction.01"))),
    "a matrix": padded(header(body=tensor(shape=(2, 4)))),
    "integers": padded(header(body=tensor(kind=26))),
    "no numbers": padded(header(body=tensor(shape=(0,))), b""),
    "too few bytes": padded(header(body=tensor(shape=(9,)))),
    "more than there is in the world": padded(header(body=tensor(shape=(2**62,)))),
    "too many bytes": padded(header(body=tensor()), bytes(32 + 64)),
    "an offset": padded(header(body=tensor(offset=64))),
    "a tensor twice": padded(header(2, body=tensor() + tensor(offset=32)), struct.pack("<16f", *range(16))),
    "overlap": padded(header(2, body=tensor() + tensor("direction.2"))),
    "widths": padded(header(2, body=tensor() + tensor("direction.2", (4,), offset=32)), b"\1" * 48),
    "nan": padded(header(body=tensor()), struct.pack("<8f", *([float("nan")] * 8))),
    "norms": padded(header(body=tensor()), struct.pack("<8f", *([3e38] * 8))),
    "zeros": padded(header(body=tensor()), bytes(32)),
}  # fmt: skip


@pytest.mark.parametrize("content", BAD.values(), ids=list(BAD))
def test_what_is_no_control_vector_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ArtifactCorrupt, match="GGUF"):
        read_vectors(path)


def test_a_large_vector_is_a_whole_concept(tmp_path: Path) -> None:
    """The squares of its numbers are beyond float32, its norm is not."""
    file = read_vectors(write(tmp_path / "a.gguf", {1: np.full(WIDTH, 1e30, np.float32)}))
    assert Concept.from_artifact(Artifact.load(imported(file, "joy", LLAMA).save(tmp_path))).layers == (1,)


def test_the_bare_file_that_those_vary_is_read(tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    path.write_bytes(padded(header(body=tensor())))
    assert is_gguf(path)
    assert torch.equal(read_vectors(path).vectors[1], torch.arange(1.0, 9.0))


def test_a_file_cut_or_flipped_anywhere_is_read_or_refused_but_never_fails(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", vectors(1, 2))
    whole = path.read_bytes()

    def attempt(content: bytes) -> Mapping[int, Tensor] | None:
        path.write_bytes(content)
        try:
            return read_vectors(path).vectors
        except ArtifactCorrupt:
            return None

    assert all(attempt(whole[:end]) is None for end in range(0, len(whole) - 32, 7))
    flips: list[Callable[[int], bytes]] = [
        lambda at: whole[:at] + bytes([whole[at] ^ 0x80]) + whole[at + 1 :],
        lambda at: whole[:at] + bytes([whole[at] ^ 0x01]) + whole[at + 1 :],
    ]
    for flip in flips:
        for at in range(len(whole) - 64):
            attempt(flip(at))
