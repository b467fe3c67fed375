"""Where a store's files are on this machine: a folder, read and written by key.

`Folder` is one of this machine's own. `steering.mirror.Mirror` is the copy of one that several machines share.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from steering.artifact import replacing, sweep


@dataclass(frozen=True)
class Health:
    """Whether a store's files can be had now, and how often since the start they could not."""

    is_reachable: bool = True
    failures: int = 0


class Folder:
    """A folder of this machine: what is in it is what there is."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def health(self) -> Health:
        """How the place where the files are kept is doing."""
        return Health()

    def look(self, key: str | None = None, *, missed: bool = False) -> None:
        """Bring one file here up to date, those of `presets/`, or without a key all of them. `missed`: it was looked
        for just now and is not here. Raises StoreUnreachable where nothing is known of them."""

    @contextmanager
    def replacing(self, key: str) -> Iterator[Path]:
        """A file to write in place of that of `key`, which takes its name when the block ends. Raises
        StoreUnwritable; nothing is changed then."""
        with replacing(self.path / key) as partial:
            yield partial

    def remove(self, key: str) -> bool:
        """Delete one file; whether it was there. Raises StoreUnwritable."""
        try:
            (self.path / key).unlink()
        except FileNotFoundError:
            return False
        return True

    def shown(self, key: str) -> str:
        """Where a file is kept, for people."""
        return str(self.path / key)

    def sweep(self) -> list[str]:
        """Delete what a killed process left half-written here and in the folders below; returns the names.

        For the start of a process, before it writes anything.
        """
        folders = [self.path, *(path for path in self.path.glob("*/") if path.is_dir())]
        return [name for folder in folders for name in sweep(folder)]


def mirrors() -> Path:
    """Where copies of shared stores are kept: $SETPOINT_MIRROR, else the platform's folder for caches."""
    if chosen := os.environ.get("SETPOINT_MIRROR"):
        return Path(chosen)
    if os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData/Local"))
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return base / "setpoint" / "mirror"
