"""What the files of a mirror are copies of, and the note of it that the next process finds beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from steering.artifact import replacing
from steering.errors import StoreUnwritable

INDEX = ".mirror.json"
Stamp: TypeAlias = tuple[int, ...] | None


@dataclass(frozen=True)
class Held:
    """What a file here is a copy of: a version of the place, by its tag; None for what was written here."""

    tag: str | None
    stamp: Stamp


def stamp(path: Path) -> Stamp:
    """What tells a file from another that has taken its name; None where there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def read_index(folder: Path) -> tuple[dict[str, Held], bool]:
    """What the files were copies of when a process last said so, and whether one had ever listed the place; nothing
    where it cannot be read."""
    try:
        said = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        held = {str(key): Held(str(tag), tuple(map(int, seen))) for key, (tag, seen) in said["files"].items()}
        return held, bool(said["listed"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}, False


def write_index(folder: Path, held: Mapping[str, Held], is_listed: bool) -> None:
    """Leave it for the next process. Where that cannot be written it copies all files anew."""
    files = {key: [one.tag, one.stamp] for key, one in held.items() if one.tag is not None}
    with suppress(StoreUnwritable), replacing(folder / INDEX) as written:
        written.write_text(json.dumps({"listed": is_listed, "files": files}), encoding="utf-8")
