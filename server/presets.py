"""Saved steering objects: presets by name, and the server's default.

    store/presets/NAME.json      store/default.json

Each is the JSON document as it was sent. It is replaced whole, and checked again when it is read: a file that somebody
has damaged is an error for whoever asks for it, never a request served unsteered.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from server.schema.steering import Composition, Part, SteeringSpec
from steering import ArtifactCorrupt, Bench, SpecError
from steering.artifact import checked_name
from steering.folder import Folder
from steering.mirror import opened

SUFFIX = ".json"
DEFAULT = f"default{SUFFIX}"
MAX_BYTES = 2**24
"""Largest file that is read."""


@dataclass(frozen=True)
class Saved:
    """A saved steering object: the document as it was sent, its meaning, and when it was written (Unix time)."""

    document: dict[str, Any]
    spec: SteeringSpec
    created: int


class Presets:
    """The saved steering objects of one store. Safe for threads.

    Hold `lock` to check something against them and act on it before they change.
    """

    def __init__(self, where: Folder | Path | str) -> None:
        self.lock = threading.RLock()
        self._place = opened(where)
        self._held: dict[str, tuple[tuple[int, ...], Saved]] = {}

    def names(self, *, here: bool = False) -> list[str]:
        """The presets by name, readable or not; `here`: of which this machine has a copy, without asking further."""
        if not here:
            self._place.look("presets/")
        paths = (self._place.path / "presets").glob(f"[!.]*{SUFFIX}")
        found = (path.name.removesuffix(SUFFIX) for path in paths if path.is_file())
        return sorted(name for name in found if _is_name(name))

    def find(self, name: str) -> Saved | None:
        """One preset; None where there is none of this name. Raises ArtifactCorrupt for a damaged file."""
        return self._read(_key(name), f"preset {name!r}") if self.exists(name) else None

    def exists(self, name: str) -> bool:
        """Whether there is a preset of this name."""
        return _is_name(name) and self._is_there(_key(name))

    def asked(self, name: str) -> SteeringSpec:
        """The preset that a request's `steering` asks for. Raises SpecError for an unknown one, ArtifactCorrupt."""
        try:
            saved = self.find(name)
        except ArtifactCorrupt as error:
            error.param = "steering.preset"
            raise
        if saved is None:
            known = ", ".join(self.names(here=True)[:32])
            expected = f"a preset of this server ({known or 'none'})"
            raise SpecError("steering.preset", expected=expected, got=name)
        return saved.spec

    def default(self) -> SteeringSpec | None:
        """The server's default. Raises ArtifactCorrupt for a damaged file."""
        saved = self.saved_default()
        return None if saved is None else saved.spec

    def saved_default(self) -> Saved | None:
        """The server's default as it was sent. Raises ArtifactCorrupt for a damaged file."""
        self._place.look(DEFAULT)  # there is none more often than not: only another's is waited for
        return self._read(DEFAULT, "the server's default")

    def put(self, name: str, document: dict[str, Any], spec: SteeringSpec, bench: Bench) -> bool:
        """Save a preset; True when its name is new. Raises SpecError for an impossible name and for what no saved
        object may say, and what compiling raises."""
        return self._write(_key(checked_name(name)), document, spec, bench)

    def put_default(self, document: dict[str, Any], spec: SteeringSpec, bench: Bench) -> bool:
        """Save the server's default; True when there was none. Raises as `put`."""
        if spec.default != "compose":
            raise SpecError("default", expected="compose, since this is the default", got=spec.default)
        return self._write(DEFAULT, document, spec, bench)

    def remove(self, name: str) -> bool:
        """Delete a preset. False where there is none of this name."""
        return _is_name(name) and self._remove(_key(name))

    def remove_default(self) -> bool:
        """Delete the server's default. False where there is none."""
        return self._remove(DEFAULT)

    def users(self, concept: str) -> list[str]:
        """What names an artifact: presets, the default. A damaged file names nothing."""
        users = [f"preset {name!r}" for name in self.names() if _mentions(self._quietly(_key(name)), concept)]
        return users + (["the server's default"] if _mentions(self._quietly(DEFAULT), concept) else [])

    def _is_there(self, key: str) -> bool:
        """Whether there is a file; asked for once more where it seems that there is none."""
        for missed in (False, True):
            self._place.look(key, missed=missed)
            if (self._place.path / key).is_file():
                return True
        return False

    def _write(self, key: str, document: dict[str, Any], spec: SteeringSpec, bench: Bench) -> bool:
        spec.check_saveable()
        with self.lock:
            Composition((Part.of_saved(spec),)).program(bench)
            is_new = not self._is_there(key)
            with self._place.replacing(key) as partial:
                partial.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        return is_new

    def _remove(self, key: str) -> bool:
        with self.lock:
            return self._is_there(key) and self._place.remove(key)

    def _read(self, key: str, title: str) -> Saved | None:
        path = self._place.path / key
        try:
            stat = path.stat()
            version = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
            held = self._held.get(key)
            if held is not None and held[0] == version:
                return held[1]
            if stat.st_size > MAX_BYTES:
                raise ValueError("too large")
            raw = path.read_bytes()
            spec = SteeringSpec.model_validate_json(raw, strict=True)
            spec.check_saveable()
            saved = Saved(json.loads(raw), spec, int(stat.st_mtime))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError, ValidationError) as error:
            raise ArtifactCorrupt(f"The file of {title} is damaged: put it again.") from error
        self._held[key] = (version, saved)
        return saved

    def _quietly(self, key: str) -> Saved | None:
        try:
            return self._read(key, "it")
        except ArtifactCorrupt:
            return None


def _key(name: str) -> str:
    return f"presets/{name}{SUFFIX}"


def _mentions(saved: Saved | None, concept: str) -> bool:
    return saved is not None and concept in saved.spec.concepts()


def _is_name(name: str) -> bool:
    try:
        checked_name(name)
    except SpecError:
        return False
    return True
