"""Artifacts on disk: one safetensors file each, metadata in the header, content-hashed, never pickle.

The header's metadata holds one JSON document under the key `setpoint`: format, kind, name, model, created, body,
content, seal. `content` is the SHA-256 over kind, model, body and every tensor (sorted by name), and identifies the
artifact; `seal` is the SHA-256 over the rest of the document. Both are computed again when a file is read, and one that
does not match is refused, so a flipped bit anywhere is found.

A file may come from anybody: its header is bounded in length, in tensors and in dimensions before anything is built
from it, a key that stands twice is refused, and the declared bytes must be the file's.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from steering.errors import ArtifactCorrupt, SpecError, StoreUnwritable

FORMAT = "setpoint/1"
SUFFIX = ".safetensors"
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}[a-z0-9]|[a-z0-9]")
FIELDS = ("format", "kind", "name", "model", "created", "body", "content", "seal")
"""Of the header's document."""
MAX_BYTES = 2**30
"""Largest artifact file that is opened."""
MAX_HEADER = 2**20
"""Longest header, in bytes: that of a concept with a hundred layers has a few thousand."""
MAX_TENSORS = 4096
MAX_DIMENSIONS = 8
PARTIAL = ".partial-"
"""How the name of a file begins that is being written; the number of the writing process follows."""
ABANDONED = 86400.0
"""Seconds after which a half-written file of another machine is given up."""


def checked_name(name: object) -> str:
    """`name` if it may name an artifact. Raises SpecError: 1 to 64 of a-z 0-9 . _ -, so that it can be no path."""
    if not isinstance(name, str) or not NAME.fullmatch(name) or ".." in name:
        raise SpecError(
            "name", expected="1 to 64 of a-z, 0-9, '.', '_', '-', beginning and ending with a letter or digit", got=name
        )
    return name


@dataclass(frozen=True, eq=False)
class Artifact:
    """Named tensors with their provenance. `body` is what the kind needs beside tensors, JSON only."""

    name: str
    kind: str
    model: str
    tensors: Mapping[str, Tensor]
    body: Mapping[str, Any] = field(default_factory=dict)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of kind, model, body and tensors; neither the name nor the date changes it."""
        sha = hashlib.sha256(json.dumps([self.kind, self.model, self.body], sort_keys=True).encode())
        for name in sorted(self.tensors):
            tensor = self.tensors[name].detach().cpu().contiguous()
            sha.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            sha.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
        return f"sha256:{sha.hexdigest()}"

    def save(self, folder: Path) -> Path:
        """Write `folder/NAME.safetensors` whole or not at all; returns the path. Raises SpecError for a bad name."""
        path = folder / f"{checked_name(self.name)}{SUFFIX}"
        with replacing(path) as partial:
            self.write(partial)
        return path

    def write(self, path: Path) -> None:
        """Write into a file that nobody reads yet."""
        header: dict[str, Any] = {
            "format": FORMAT,
            "kind": self.kind,
            "name": self.name,
            "model": self.model,
            "created": self.created,
            "body": self.body,
            "content": self.fingerprint,
        }
        header["seal"] = _seal(header)
        # Copies, for safetensors refuses tensors that share memory.
        copies = {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in self.tensors.items()}
        save_file(copies, path, metadata={"setpoint": json.dumps(header, sort_keys=True)})

    @classmethod
    def load(cls, path: Path) -> Artifact:
        """Read and verify one file. Raises ArtifactCorrupt, which says what is wrong with it."""
        before = _version(path)
        try:
            return cls._verified(path)
        except ArtifactCorrupt:
            if _version(path) == before:
                raise
            return cls.load(path)  # it was replaced between two openings of the path, and each saw another file

    @classmethod
    def _verified(cls, path: Path) -> Artifact:
        header = read_header(path)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise _corrupt(path, "its tensors cannot be read") from error
        artifact = cls(header["name"], header["kind"], header["model"], tensors, header["body"], header["created"])
        if artifact.fingerprint != header["content"]:
            raise _corrupt(path, "its content does not match its hash")
        # In float64, for the number formats of eight bits have no test of their own.
        if any(t.is_floating_point() and not torch.isfinite(t.double()).all() for t in tensors.values()):
            raise _corrupt(path, "it holds NaN or Inf")
        return artifact


def read_header(path: Path) -> dict[str, Any]:
    """The metadata of an artifact without its tensors. Raises ArtifactCorrupt."""
    try:
        _check_container(path)
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["setpoint"], parse_constant=_no_constant)
        fields = {name: header[name] for name in FIELDS}
        seal = _seal({name: value for name, value in fields.items() if name != "seal"})
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise _corrupt(path, "it is not a safetensors file written by Setpoint") from error
    if fields["format"] != FORMAT:
        raise _corrupt(path, f"its format is not {FORMAT}")
    if not all(isinstance(value, dict if name == "body" else str) for name, value in fields.items()):
        raise _corrupt(path, "its metadata has wrong types")
    if fields.pop("seal") != seal:
        raise _corrupt(path, "its metadata does not match its seal")
    try:
        checked_name(fields["name"])
    except SpecError as error:
        raise _corrupt(path, "its metadata holds an impossible name") from error
    return fields


def _version(path: Path) -> tuple[int, ...] | None:
    """What differs between two files that stood at a path one after the other; None where there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


@contextmanager
def partial_file(folder: Path) -> Iterator[Path]:
    """An empty file in `folder`, which is gone after the block unless the block has moved it.

    Raises StoreUnwritable where it cannot be made or written: no room, no folder, no permission.
    """
    name = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, prefix=f"{PARTIAL}{machine()}-{os.getpid()}-")
        os.close(handle)
        yield Path(name)
    except (OSError, SafetensorError) as error:
        why = (getattr(error, "strerror", None) or "it cannot be used").lower()
        raise StoreUnwritable(f"The file cannot be written to its folder: {why}.") from error
    finally:
        if name is not None:
            Path(name).unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write in place of `path`: it takes its name when the block ends, and is gone when the block raises.

    Whoever opens `path` sees the old file or the new one, whole.
    """
    with partial_file(path.parent) as partial:
        yield partial
        settle(partial, path)


def settle(partial: Path, path: Path) -> None:
    """Give a file that has been written whole its name, once its bytes are on the disk."""
    with partial.open("rb") as written:
        os.fsync(written.fileno())
    partial.chmod(0o644)
    partial.replace(path)


def sweep(folder: Path) -> list[str]:
    """Delete what a writer left half-written in `folder`: files of processes that are no more, and of this one.

    Of another machine that shares the folder, whose processes nobody here can ask, only what is a day old. Only for a
    process that does not write yet. Returns the names.
    """
    left = []
    for path in sorted(folder.glob(f"{PARTIAL}*")) if folder.is_dir() else ():
        if is_abandoned(path.name, _written(path)):
            path.unlink(missing_ok=True)
            left.append(path.name)
    return left


def is_abandoned(name: str, written: float) -> bool:
    """Whether nobody will finish a half-written file of this name, last written at `written` (Unix time)."""
    place, _, rest = name.removeprefix(PARTIAL).partition("-")
    owner = rest.partition("-")[0]
    if place == machine() and owner.isdecimal() and len(owner) < 10:
        return int(owner) == os.getpid() or not _is_alive(int(owner))
    return time.time() - written >= ABANDONED


def _written(path: Path) -> float:
    """When a file was last written; never, in time to come, for one that has just taken its final name."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return math.inf


def machine() -> str:
    """This machine, or container, in eight letters: process numbers mean nothing beyond it."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _is_alive(process: int) -> bool:
    if os.name == "nt":  # where signal 0 is no question
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        pass
    return True


def _check_container(path: Path) -> None:
    """Refuse a file that is too large, or a safetensors header that is too long, has a key twice or absurd tensors, or
    does not cover the file.

    Raises ArtifactCorrupt, ValueError for what is no header at all.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_BYTES:
            raise _corrupt(path, f"it is larger than {MAX_BYTES} bytes")
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ValueError("no header")
        if length > MAX_HEADER:
            raise _corrupt(path, f"its header is longer than {MAX_HEADER} bytes")
        header = json.loads(file.read(length), object_pairs_hook=_unique)
    if not isinstance(header, dict):
        raise ValueError("no header")
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise _corrupt(path, f"it has more than {MAX_TENSORS} tensors")
    end = 0
    for tensor in header.values():
        shape = tensor["shape"]
        if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n <= MAX_BYTES for n in shape):
            raise _corrupt(path, "a tensor of it has an absurd shape")
        end = max(end, tensor["data_offsets"][1])
    if end != size - 8 - length:
        raise _corrupt(path, f"it has {size - 8 - length} bytes of numbers where its header declares {end}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a key that stands twice, of which readers take either."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _seal(fields: Mapping[str, Any]) -> str:
    """SHA-256 of the header's document without its seal. Raises ValueError where the body holds NaN or Inf."""
    document = json.dumps(fields, sort_keys=True, allow_nan=False)
    return f"sha256:{hashlib.sha256(document.encode()).hexdigest()}"


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _corrupt(path: Path, why: str) -> ArtifactCorrupt:
    return ArtifactCorrupt(f"Artifact {path.name!r} cannot be used: {why}; fit or import it again.", param="name")
