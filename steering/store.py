"""The store: artifacts by name in one writable folder, over the read-only folder of those that ship with the model."""

from __future__ import annotations

import threading
from bisect import bisect
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from steering.artifact import SUFFIX, Artifact, checked_name, read_header
from steering.concept import KIND, Concept
from steering.errors import ArtifactCorrupt, ArtifactError, ArtifactNotFound, SpecError, StaleFingerprint, echo
from steering.folder import Folder
from steering.mirror import opened
from steering.plan import PLANS, Plan
from steering.plant.massive import Caution

P = TypeVar("P", bound=Plan)
KEPT = 512
"""Concepts, and plans, that a shelf keeps loaded: a concept of an 8B model has a megabyte or two."""
NAMED, CLOSE, NEAREST = 64, 16, 5
"""An error about an unknown name looks at up to so many artifacts; of more at the closest, and names the nearest."""
COMPARED = 256
"""Names, next to the unknown one in the order of letters, among which those are looked for."""


@dataclass(frozen=True)
class Entry:
    """One line of the store's listing, read from the header alone."""

    name: str
    kind: str
    fingerprint: str
    model: str
    created: str
    quality: dict[str, Any]
    builtin: bool


class Store:
    """Artifacts addressed by name. A name in the writable folder hides a built-in one.

    `where` is a folder, or the URL of one that several machines share, of which `folder` is the copy on this machine.
    """

    def __init__(self, where: Folder | Path | str, builtin: Path | None = None) -> None:
        self.place = opened(where)
        self.folder = self.place.path
        self.builtin = builtin

    def path(self, name: str) -> Path:
        """The file of an artifact. Raises SpecError for an impossible name, ArtifactNotFound for an unknown one."""
        key = f"{checked_name(name)}{SUFFIX}"
        self.place.look(key)
        for folder in (self.folder, self.builtin):
            if folder is not None and (found := folder / key).is_file():
                return found
        self.place.look(key, missed=True)
        if (found := self.folder / key).is_file():
            return found
        raise ArtifactNotFound(
            f"There is no artifact named {name!r}; `setpoint artifacts list` names those there are.", param="name"
        )

    def entries(self, *, here: bool = False) -> list[Entry]:
        """Every readable artifact, by name; `here`: of which this machine has a copy, without asking further. Damaged
        files are left out; `verify` names them."""
        found: dict[str, Entry] = {}
        if not here:
            self.place.look()
        for folder in (self.builtin, self.folder):
            if folder is None or not folder.is_dir():
                continue
            for path in sorted(folder.glob(f"[!.]*{SUFFIX}")):
                name = path.name.removesuffix(SUFFIX)
                # Hidden, even where the file that hides it is damaged: `load` would open that one.
                found.pop(name, None)
                try:
                    header = read_header(path)
                    checked_name(name)
                except (ArtifactCorrupt, SpecError):
                    continue
                body = header["body"]
                found[name] = Entry(
                    name,
                    header["kind"],
                    header["content"],
                    header["model"],
                    header["created"],
                    quality if isinstance(quality := body.get("quality"), dict) else {},
                    folder is self.builtin,
                )
        return [found[name] for name in sorted(found)]

    def load(self, name: str) -> Artifact:
        """One artifact, verified. Raises SpecError, ArtifactNotFound, ArtifactCorrupt."""
        return Artifact.load(self.path(name))

    def save(self, artifact: Artifact) -> Path:
        """Write to the writable folder, whole or not at all. Raises SpecError for a bad name, StoreUnwritable."""
        key = f"{checked_name(artifact.name)}{SUFFIX}"
        with self.place.replacing(key) as partial:
            artifact.write(partial)
        return self.folder / key

    def names(self, *, here: bool = False) -> list[str]:
        """Of every artifact there is a file of, readable or not; `here` as for `entries`."""
        if not here:
            self.place.look()
        folders = (folder for folder in (self.folder, self.builtin) if folder is not None)
        return sorted({path.name.removesuffix(SUFFIX) for one in folders for path in one.glob(f"[!.]*{SUFFIX}")})

    def shown(self, name: str) -> str:
        """Where an artifact is kept that was saved under a name, for people."""
        return self.place.shown(f"{name}{SUFFIX}")

    def is_builtin(self, name: str) -> bool:
        """Whether a built-in artifact has this name. Raises SpecError for an impossible one."""
        return self.builtin is not None and (self.builtin / f"{checked_name(name)}{SUFFIX}").is_file()

    def require_own(self, name: str) -> None:
        """Raises ArtifactError when the name is that of a built-in artifact, which a new one would hide, and SpecError
        for an impossible name."""
        if self.is_builtin(name):
            raise ArtifactError(
                f"name: expected a name that no built-in artifact has, got {name!r}; choose another one.", param="name"
            )

    def remove(self, name: str) -> None:
        """Delete from the writable folder. Raises ArtifactError for a built-in artifact, ArtifactNotFound,
        StoreUnwritable."""
        path = self.path(name)
        if path.parent == self.builtin:
            raise ArtifactError(
                f"name: expected an artifact of the store, got {name!r}; this one ships with the model.", param="name"
            )
        self.place.remove(path.name)

    def sweep(self) -> list[str]:
        """Delete what a killed process left half-written; returns the names. For the start of a process, before it
        writes anything."""
        return self.place.sweep()


def held_in(found: Artifact) -> Concept | Plan:
    """What an artifact holds. Raises ArtifactCorrupt when it is not whole, or of a kind that there is not."""
    if found.kind == KIND:
        return Concept.from_artifact(found)
    if found.kind in PLANS:
        return PLANS[found.kind].from_artifact(found)
    kinds = ", ".join(PLANS)
    raise ArtifactCorrupt(
        f"The file holds a {echo(found.kind)}; expected a {KIND}, or a plan of kind {kinds}.", param="name"
    )


class Shelf:
    """The concepts and plans of one model, loaded once: the `Bench` that methods compile against."""

    def __init__(self, store: Store, *, model: str, depth: int, width: int, caution: Caution | None = None) -> None:
        self.store = store
        self.model = model
        self.depth = depth
        self.width = width
        self.caution = caution or Caution()
        self._loaded: dict[str, tuple[tuple[int, ...], Concept]] = {}
        self._plans: dict[str, tuple[tuple[int, ...], Plan]] = {}
        self._lock = threading.Lock()

    def concept(self, name: str) -> Concept:
        """A concept fitted on this model.

        Raises SpecError for an unknown name, StaleFingerprint for another model's, ArtifactCorrupt for a damaged one.
        """
        path, version = self._found("concept", name, KIND)
        held = self._loaded.get(name)
        if held is not None and held[0] == version:
            return held[1]
        found = Artifact.load(path)
        self._require_kind("concept", name, found, KIND)
        concept = self.checked(Concept.from_artifact(found), name)
        self._keep(self._loaded, name, version, concept)
        return concept

    def plan(self, name: str, kind: type[P]) -> P:
        """A plan of this model and of one kind.

        Raises SpecError for an unknown name and for an artifact of another kind, StaleFingerprint for another model's,
        ArtifactCorrupt for a damaged one.
        """
        path, version = self._found("plan", name, kind.kind)
        held = self._plans.get(name)
        if held is not None and held[0] == version and isinstance(held[1], kind):
            return held[1]
        try:
            found = Artifact.load(path)
        except ArtifactCorrupt as error:
            error.param = "plan"
            raise
        self._require_kind("plan", name, found, kind.kind)
        plan = kind.from_artifact(found).require(model=self.model, depth=self.depth, width=self.width, label=name)
        self._keep(self._plans, name, version, plan)
        return plan

    def _keep(self, loaded: dict[str, Any], name: str, version: tuple[int, ...], held: Concept | Plan) -> None:
        """Remember what was loaded, and forget what was loaded first of more than `KEPT`."""
        with self._lock:
            loaded.pop(name, None)
            loaded[name] = (version, held)
            while len(loaded) > KEPT:
                del loaded[next(iter(loaded))]

    def _found(self, field: str, name: str, kind: str) -> tuple[Path, tuple[int, ...]]:
        """The file of an artifact, and its version. Raises SpecError, with the names there are, for an unknown one."""
        try:
            path = self.store.path(name)
            stat = path.stat()
        except (ArtifactNotFound, FileNotFoundError, SpecError) as error:
            what = "a concept" if kind == KIND else f"a plan of kind {kind!r}"
            raise SpecError(field, expected=f"{what} of this model ({self._near(name, kind)})", got=name) from error
        # A file is replaced whole, so that a new version is a new inode even within one tick of the clock.
        return path, (stat.st_mtime_ns, stat.st_ino, stat.st_size)

    def _near(self, name: str, kind: str) -> str:
        """What a name that there is not could have meant. A name that somebody made up brings no file of a shared store
        here, and has few headers read however many artifacts there are."""
        names = self.store.names(here=True)
        near = names
        if len(names) > NAMED:
            at = max(0, bisect(names, name) - COMPARED // 2)
            near = get_close_matches(name[:64], names[at : at + COMPARED], CLOSE)
        known = [one for one in near if self._is_own(one, kind)]
        if len(names) <= NAMED:
            return ", ".join(known) or "none"
        return f"nearest: {', '.join(known[:NEAREST]) or 'none'}; {len(names)} artifacts in all"

    def _is_own(self, name: str, kind: str) -> bool:
        """Whether the file here of this name says that it is of this kind and of this model."""
        path = self.store.folder / f"{name}{SUFFIX}"
        if not path.is_file() and self.store.builtin is not None:
            path = self.store.builtin / path.name
        try:
            checked_name(name)
            header = read_header(path)
        except (ArtifactCorrupt, SpecError):
            return False
        return bool(header["kind"] == kind and header["model"] == self.model)

    def _require_kind(self, field: str, name: str, found: Artifact, kind: str) -> None:
        if found.kind != kind:
            what = "a concept" if kind == KIND else f"a plan of kind {kind!r}"
            raise SpecError(field, expected=what, got=name, advice=f"that artifact is of kind {echo(found.kind)}")

    def require_own(self, held: Concept | Plan, name: str) -> None:
        """Raises StaleFingerprint that tells both sides unless `held`, named `name`, is one of this model's."""
        if isinstance(held, Plan):
            held.require(model=self.model, depth=self.depth, width=self.width, label=name)
        else:
            self.checked(held, name)

    def checked(self, concept: Concept, name: str) -> Concept:
        """`concept` if it is one of this model's. Raises StaleFingerprint that tells both sides; `name` is its name."""
        theirs, ours = (concept.depth, concept.width), (self.depth, self.width)
        if concept.model != self.model:
            sizes = "" if theirs == ours else f" of {theirs[0]} layers of width {theirs[1]}"
            own = f" of {ours[0]} layers of width {ours[1]}" if sizes else ""
            raise StaleFingerprint(
                f"Concept {name!r} was fitted on model {concept.model[:19]}…{sizes}, this is {self.model[:19]}…{own}; "
                "fit it again on this model.",
                param="concept",
            )
        if theirs != ours:
            raise StaleFingerprint(
                f"Concept {name!r} has {concept.depth} layers of width {concept.width}, the model has {self.depth} of "
                f"width {self.width}; fit it again on this model.",
                param="concept",
            )
        return concept
