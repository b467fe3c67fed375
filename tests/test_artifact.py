"""An artifact comes back as it was saved, or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from steering import artifact as module
from steering.artifact import FORMAT, Artifact, checked_name, read_header, replacing
from steering.errors import ArtifactCorrupt, SpecError, StoreUnwritable

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool)
SMALL = Artifact(
    "tone", "concept", "sha256:00", {"v": torch.arange(6.0).view(2, 3), "n": torch.tensor(3)}, {"layers": [1]}
)


def same(a: Artifact, b: Artifact) -> bool:
    """Equal in every field, tensors by their bytes."""
    plain = all(getattr(a, f.name) == getattr(b, f.name) for f in fields(Artifact) if f.name not in ("tensors", "body"))
    bodies = json.dumps(a.body, sort_keys=True) == json.dumps(b.body, sort_keys=True)
    return plain and bodies and a.fingerprint == b.fingerprint


def header_of(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        document: dict[str, Any] = json.loads(file.metadata()["setpoint"])
    return document


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any], *, seal: bool = True) -> None:
    """The same tensors under a changed header document, sealed anew as an editor who knows the format would."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    document = header_of(path)
    change(document)
    if seal:
        document.pop("seal", None)
        document["seal"] = module._seal(document)
    save_file(tensors, path, metadata={"setpoint": json.dumps(document, sort_keys=True)})


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a.b": torch.randn(3, 4).to(dtype), "scalar": torch.tensor(1).to(dtype), "none": torch.zeros(0, 4)}
    saved = Artifact("x-1.y_z", "plan", "sha256:ff", tensors, {"π": "é", "deep": {"list": [1, None, 0.1]}, "t": (1, 2)})
    loaded = Artifact.load(saved.save(tmp_path))
    assert same(saved, loaded)
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in tensors.items())
    assert read_header(tmp_path / "x-1.y_z.safetensors")["content"] == saved.fingerprint


def test_tensors_may_be_views_and_share_memory(tmp_path: Path) -> None:
    base = torch.randn(4, 4)
    tensors = {"row": base[1], "transposed": base.mT, "again": base}
    loaded = Artifact.load(Artifact("x", "plan", "m", tensors).save(tmp_path))
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in tensors.items())


def test_the_fingerprint_is_of_the_content() -> None:
    assert replace(SMALL, name="other", created="1970").fingerprint == SMALL.fingerprint
    changed = [
        replace(SMALL, kind="plan"),
        replace(SMALL, model="sha256:01"),
        replace(SMALL, body={"layers": [2]}),
        replace(SMALL, tensors={**SMALL.tensors, "v": SMALL.tensors["v"] + 1}),
        replace(SMALL, tensors={**SMALL.tensors, "v": SMALL.tensors["v"].view(3, 2)}),
        replace(SMALL, tensors={**SMALL.tensors, "v": SMALL.tensors["v"].view(torch.int32)}),
        replace(SMALL, tensors={"w": SMALL.tensors["v"], "n": SMALL.tensors["n"]}),
    ]
    assert len({SMALL.fingerprint, *(a.fingerprint for a in changed)}) == len(changed) + 1


def test_a_flipped_bit_anywhere_is_found(tmp_path: Path) -> None:
    path = SMALL.save(tmp_path)
    whole = path.read_bytes()
    undetected = []
    for index in range(len(whole)):
        damaged = bytearray(whole)
        damaged[index] ^= 1 << (index * 5 + index // 8) % 8
        path.write_bytes(damaged)
        try:
            loaded = Artifact.load(path)
        except ArtifactCorrupt:
            continue
        if not same(loaded, SMALL):  # the case of a hexadecimal digit in an escape may flip and mean the same
            undetected.append(index)
    assert undetected == []


@given(st.integers(0, 10_000), st.integers(0, 7))
def test_any_bit(tmp_path_factory: pytest.TempPathFactory, index: int, bit: int) -> None:
    path = SMALL.save(tmp_path_factory.mktemp("bit"))
    damaged = bytearray(path.read_bytes())
    damaged[index % len(damaged)] ^= 1 << bit
    path.write_bytes(damaged)
    try:
        loaded = Artifact.load(path)
    except ArtifactCorrupt:
        return
    assert same(loaded, SMALL)


def test_a_truncated_file_is_found(tmp_path: Path) -> None:
    path = SMALL.save(tmp_path)
    whole = path.read_bytes()
    for length in (0, 1, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ArtifactCorrupt, match=r"'tone\.safetensors' cannot be used"):
            Artifact.load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ArtifactCorrupt):
        Artifact.load(path)


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\x80\x04K\x01.", b"\xff" * 64])
def test_another_kind_of_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ArtifactCorrupt, match="not a safetensors file written by Setpoint"):
        read_header(path)


def test_a_foreign_safetensors_file_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2)}, tmp_path / "x.safetensors")
    save_file({"w": torch.zeros(2)}, tmp_path / "y.safetensors", metadata={"setpoint": "[]"})
    save_file({"w": torch.zeros(2)}, tmp_path / "z.safetensors", metadata={"setpoint": "[" * 100_000})
    for name in "xyz":
        with pytest.raises(ArtifactCorrupt, match="not a safetensors file written by Setpoint"):
            Artifact.load(tmp_path / f"{name}.safetensors")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "d.safetensors").mkdir()
    for name in ("d", "absent"):
        with pytest.raises(ArtifactCorrupt):
            Artifact.load(tmp_path / f"{name}.safetensors")


def test_a_huge_file_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = SMALL.save(tmp_path)
    monkeypatch.setattr(module, "MAX_BYTES", path.stat().st_size - 1)
    with pytest.raises(ArtifactCorrupt, match="larger than"):
        Artifact.load(path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_that_are_not_finite_are_refused(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    path = Artifact("x", "plan", "m", {"t": torch.tensor([0.0, value], dtype=dtype)}).save(tmp_path)
    with pytest.raises(ArtifactCorrupt, match="NaN or Inf"):
        Artifact.load(path)


def test_eight_bit_floats_are_checked_too(tmp_path: Path) -> None:
    finite, nan = (torch.tensor([1.0, value]).to(torch.float8_e4m3fn) for value in (2.0, math.nan))
    assert "t" in Artifact.load(Artifact("x", "plan", "m", {"t": finite}).save(tmp_path)).tensors
    with pytest.raises(ArtifactCorrupt, match="NaN or Inf"):
        Artifact.load(Artifact("x", "plan", "m", {"t": nan}).save(tmp_path))


def test_a_body_is_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        Artifact("x", "plan", "m", {}, {"quality": math.nan}).save(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda d: d.update(format="setpoint/0"), f"format is not {FORMAT}"),
        (lambda d: d.update(body=[]), "wrong types"),
        (lambda d: d.update(name=3), "wrong types"),
        (lambda d: d.update(name="../up"), "impossible name"),
        (lambda d: d.update(body={"layers": [2]}), "does not match its hash"),
        (lambda d: d.update(content="sha256:0"), "does not match its hash"),
        (lambda d: d.update(model="sha256:01"), "does not match its hash"),
        (lambda d: d.pop("created"), "not a safetensors file written by Setpoint"),
    ],
)
def test_a_changed_header_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], Any], why: str) -> None:
    path = SMALL.save(tmp_path)
    rewrite(path, change)
    with pytest.raises(ArtifactCorrupt, match=why):
        Artifact.load(path)


def test_a_number_beyond_float64_in_a_header_is_refused(tmp_path: Path) -> None:
    path = SMALL.save(tmp_path)
    with safe_open(path, framework="pt") as file:
        document = file.metadata()["setpoint"]
    save_file(
        {"v": torch.zeros(1)}, path, metadata={"setpoint": document.replace('"layers": [1]', '"layers": [1e999]')}
    )
    with pytest.raises(ArtifactCorrupt, match="written by Setpoint"):
        read_header(path)


@pytest.mark.parametrize("name", ["name", "created", "kind", "model"])
def test_the_seal_covers_every_field(tmp_path: Path, name: str) -> None:
    path = SMALL.save(tmp_path)
    rewrite(path, lambda d: d.update({name: "changed"}), seal=False)
    with pytest.raises(ArtifactCorrupt, match="seal"):
        read_header(path)


# Names


@pytest.mark.parametrize("name", ["a", "0", "positive", "a.b_c-d", "x" * 64])
def test_possible_names(name: str) -> None:
    assert checked_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "A",
        ".a",
        "a.",
        "-a",
        "a/b",
        "../a",
        "a..b",
        "a\\b",
        "a\n",
        "a b",
        "ü",
        "x" * 65,
        "a\0",
        "~",
        "/etc/x",
        None,
        3,
    ],
)
def test_impossible_names(name: object, tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        checked_name(name)
    assert caught.value.param == "name"
    with pytest.raises(SpecError):
        replace(SMALL, name=name).save(tmp_path / "new")  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()


@given(st.text(alphabet="ab0./\\-_~:", max_size=12))
def test_no_name_leaves_its_folder(name: str) -> None:
    try:
        checked_name(name)
    except SpecError:
        return
    folder = Path("/store")
    assert Path(os.path.normpath(folder / f"{name}.safetensors")).parent == folder


# Writing


@pytest.mark.parametrize("stage", ["save_file", "fsync", "replace"])
def test_a_crash_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    path = SMALL.save(tmp_path)
    before = path.read_bytes()

    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module if stage == "save_file" else os, stage, crash)
    with pytest.raises(KeyboardInterrupt):
        replace(SMALL, body={}).save(tmp_path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_saving_replaces(tmp_path: Path) -> None:
    SMALL.save(tmp_path)
    path = replace(SMALL, body={"layers": [3]}).save(tmp_path)
    assert Artifact.load(path).body == {"layers": [3]}
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644


def container(path: Path, header: str | bytes, data: bytes = b"", *, length: int | None = None) -> Path:
    """A safetensors file made by hand."""
    raw = header.encode() if isinstance(header, str) else header
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


ONE = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'


@pytest.mark.parametrize(
    ("header", "data", "length", "said"),
    [
        ("{}", b"", 2**63, "not a safetensors file"),
        ("", b"", None, "not a safetensors file"),
        ("[]", b"", None, "not a safetensors file"),
        ('{"v": 1}', b"", None, "not a safetensors file"),
        (b"\xff\xff", b"", None, "not a safetensors file"),
        ("[" * 100_000, b"", None, "not a safetensors file"),
        (f'{{"v": {ONE}, "v": {ONE}}}', bytes(4), None, "not a safetensors file"),
        ("{" + " " * 2**20 + "}", b"", None, "header is longer than"),
        ("{" + ", ".join(f'"{i}": {ONE}' for i in range(4097)) + "}", bytes(4), None, "more than 4096 tensors"),
        ('{"v": {"dtype": "F32", "shape": [0, 4611686018427387904], "data_offsets": [0, 0]}}', b"", None, "absurd"),
        ('{"v": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', bytes(4), None, "absurd"),
        (f'{{"v": {{"dtype": "F32", "shape": {[1] * 9}, "data_offsets": [0, 4]}}}}', bytes(4), None, "absurd"),
        (f'{{"v": {ONE}}}', bytes(8), None, "8 bytes of numbers where its header declares 4"),
        (f'{{"v": {ONE}}}', bytes(3), None, "3 bytes of numbers where its header declares 4"),
    ],
)  # fmt: skip
def test_hostile_headers(tmp_path: Path, header: str | bytes, data: bytes, length: int | None, said: str) -> None:
    with pytest.raises(ArtifactCorrupt, match=said):
        read_header(container(tmp_path / "x.safetensors", header, data, length=length))


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with replacing(path) as partial:
        partial.write_text("old")

    def break_off() -> None:
        with replacing(path) as partial:
            partial.write_text("new")
            assert path.read_text() == "old"
            raise RuntimeError

    with pytest.raises(RuntimeError):
        break_off()
    assert [one.name for one in tmp_path.iterdir()] == ["x"]
    assert path.read_text() == "old"


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = (Artifact("a", "concept", "m", {"v": torch.full((n,), 1.0)}, {"n": n}) for n in (4, 5))
    path = old.save(tmp_path)
    opened, calls = module.safe_open, list[None]()

    def replaced_behind(*arguments: Any, **options: Any) -> Any:
        handle = opened(*arguments, **options)
        calls.append(None)
        if len(calls) == 1:
            new.save(tmp_path)
        return handle

    monkeypatch.setattr(module, "safe_open", replaced_behind)
    assert Artifact.load(path).fingerprint == new.fingerprint
    assert len(calls) == 4, "header and tensors, twice"


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnwritable, match="cannot be written"):
        SMALL.save(tmp_path / "file" / "store")
