"""The files of a store that is elsewhere, by key: listed, asked for, read, written whole or not at all, through fsspec.

    s3://bucket/prefix    gs://bucket/prefix    hf://datasets/USER/NAME/prefix    memory://name    file:///folder

A key is `NAME.safetensors`, `presets/NAME.json` or `default.json`; whatever else lies there is passed over, so that no
name of somebody else's becomes a path here. A version is what the place says of a file: its etag, its generation, or
where it has neither its number, its time and its size. Whoever reads sees the old file or the new one: object stores
show an upload when it is complete; elsewhere a file is written aside and renamed.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from steering.artifact import MAX_BYTES, PARTIAL, SUFFIX, checked_name, is_abandoned, machine
from steering.errors import SpecError

OBJECTS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "hf": "", "memory": ""}
"""Places where an upload is seen when it is complete, with the extra that brings their package."""
FILES = ("file", "local")
"""Places where a half-written file is seen, and renaming is one step."""
HUB_KIND = re.compile("^(datasets|spaces|models)/")
PACE = {"hf": 10.0}
"""Places that bound how often they may be asked: how many times less often this is done."""
TAGS = ("ETag", "etag", "generation", "md5Hash", "oid", "blob_id", "xet_hash")
"""What names a file's content, of whoever has it: the first alone is the version."""
TIMES = ("LastModified", "last_modified", "mtime", "updated", "created")
"""When a file was written, most exact first."""
WHOLE = 2**26
"""Bytes up to which a file goes through memory; larger ones are streamed."""
PATIENT = {"config_kwargs": {"connect_timeout": 5, "read_timeout": 20, "retries": {"max_attempts": 2}}}
"""For S3, whose client would else ask an address that does not answer for five minutes."""


@dataclass(frozen=True)
class Version:
    """What differs between two files of one key: the tag. `modified` is Unix time, 0 where the place does not say."""

    tag: str
    size: int
    modified: float


def is_url(where: str | Path) -> bool:
    """Whether a store is named by a URL, and no folder of this machine."""
    return isinstance(where, str) and "://" in where


def is_key(key: str) -> bool:
    """Whether a store has files of this name."""
    folder, _, name = key.rpartition("/")
    stem = name.removesuffix(SUFFIX if not folder and name.endswith(SUFFIX) else ".json")
    if stem == name or folder not in ("", "presets") or (not folder and name.endswith(".json") and stem != "default"):
        return False
    try:
        checked_name(stem)
    except SpecError:
        return False
    return True


class Remote:
    """One place. Every call may raise whatever its file system raises; FileNotFoundError for a file that is not there.

    Safe for threads. Nothing is remembered between calls.
    """

    def __init__(self, files: Any, root: str, *, renames: bool = False, pace: float = 1.0) -> None:
        self.root = root.rstrip("/")
        self.pace = pace
        self._files = files
        self._renames = renames

    @classmethod
    def of(cls, url: str) -> Remote:
        """The place of a URL. Raises SpecError for one that names no place, or needs a package that is not there."""
        import fsspec

        scheme, _, rest = url.partition("://")
        known = ", ".join(f"{one}://" for one in ("s3", "gs", "hf", "memory", "file"))
        if scheme not in (*OBJECTS, *FILES) or not rest.strip("/") or "::" in url:
            raise SpecError("store", expected=f"a folder, or a URL of {known} with a bucket or folder", got=scheme)
        if scheme == "hf" and len(HUB_KIND.sub("", rest).strip("/").split("/")) < 2:
            raise SpecError("store", expected="hf://datasets/USER/NAME, or with a folder behind it", got=url)
        options: dict[str, Any] = {"use_listings_cache": False}
        if OBJECTS.get(scheme) == "s3":
            options |= {**PATIENT, **fsspec.config.conf.get("s3", {})}
        try:
            files, root = fsspec.core.url_to_fs(url, **options)
        except ImportError as error:
            raise SpecError(
                "store",
                expected="a URL whose package is installed",
                got=f"{scheme}://",
                advice=f"pip install 'setpoint[{OBJECTS.get(scheme)}]'",
            ) from error
        return cls(files, root, renames=scheme in FILES, pace=PACE.get(scheme, 1.0))

    def listing(self, folder: str = "") -> dict[str, Version]:
        """Every file of the store, or of one folder of it (`presets/`), by key, as one listing has it."""
        self._files.invalidate_cache()
        if self._renames and not self._files.isdir(self.root):
            raise FileNotFoundError(self.root)  # a disk that is not mounted is no empty store
        found = self._files.find(f"{self.root}/{folder}".rstrip("/"), detail=True)
        start = f"{self.root}/"
        keys = {str(path)[len(start) :]: info for path, info in found.items() if str(path).startswith(start)}
        versions = {key: _version(info) for key, info in keys.items() if is_key(key)}
        return {key: version for key, version in versions.items() if version.size <= MAX_BYTES}

    def ask(self, key: str) -> Version | None:
        """The version of one file; None where there is none."""
        self._files.invalidate_cache()
        try:
            version = _version(self._files.info(f"{self.root}/{key}"))
        except FileNotFoundError:
            return None
        return version if version.size <= MAX_BYTES else None

    def read(self, key: str, size: int, into: Path) -> None:
        """Copy one file, of about `size` bytes, into a file here."""
        if size <= WHOLE:
            into.write_bytes(self._files.cat_file(f"{self.root}/{key}"))
        else:
            self._files.get_file(f"{self.root}/{key}", str(into))

    def write(self, key: str, source: Path) -> None:
        """Copy a file to a key, whole or not at all."""
        path = f"{self.root}/{key}"
        if not self._renames:
            self._put(source, path)
            return
        folder = path.rpartition("/")[0]
        self._files.makedirs(folder, exist_ok=True)
        aside = f"{folder}/{PARTIAL}{machine()}-{os.getpid()}-{uuid.uuid4().hex}"
        try:
            self._put(source, aside)
            self._files.mv(aside, path)
        except BaseException:
            if self._files.exists(aside):
                self._files.rm_file(aside)
            raise

    def remove(self, key: str) -> None:
        """Delete one file; nothing where there is none."""
        with suppress(FileNotFoundError):
            self._files.rm_file(f"{self.root}/{key}")

    def sweep(self) -> list[str]:
        """Delete what a killed writer left half-written; returns the names. Object stores show none."""
        left = []
        if self._renames and self._files.isdir(self.root):
            for path, info in self._files.find(self.root, detail=True).items():
                name = str(path).rpartition("/")[2]
                if name.startswith(PARTIAL) and is_abandoned(name, _version(info).modified):
                    self._files.rm_file(path)
                    left.append(name)
        return left

    def _put(self, source: Path, path: str) -> None:
        if source.stat().st_size <= WHOLE:
            self._files.pipe_file(path, source.read_bytes())
        else:
            self._files.put_file(str(source), path)


def _version(info: Mapping[str, Any]) -> Version:
    size = int(info.get("size") or info.get("Size") or 0)
    modified = next((_seconds(info[name]) for name in TIMES if info.get(name) is not None), 0.0)
    tag = next((str(info[name]).strip('"') for name in TAGS if info.get(name)), None)
    return Version(tag or f"{info.get('ino', '')}-{modified!r}-{size}", size, modified)


def _seconds(time: object) -> float:
    """A time as file systems tell it, as Unix time: listing and asking may use different types for one file."""
    if isinstance(time, datetime):
        return time.timestamp()
    if isinstance(time, str):
        try:
            return datetime.fromisoformat(time).timestamp()
        except ValueError:
            return 0.0
    return float(time) if isinstance(time, int | float) else 0.0
