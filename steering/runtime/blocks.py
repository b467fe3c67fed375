"""Which blocks of the key/value pool are whose, and what the prefix cache knows. No torch here.

A sequence holds its keys and values in blocks of a fixed number of positions. A block that is full of a prompt gets a
name: a digest of all tokens up to its end and of what steered them there. Whoever comes later with the same name takes
the block over instead of computing it. So a prefix is shared by every program that leaves it untouched (with
`prompt: last` all of it but the last token), and a steered one only by requests that steer it alike.

What was measured while a steered block was computed is remembered with it, so that a receipt stays whole: a request
that takes a block over is told what its control did there.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np

Record = TypeVar("Record")


class Blocks(Generic[Record]):
    """Blocks 1 … n of a pool, counted by holders. Block 0 belongs to nobody: it pads tables.

    A named block that nobody holds stays findable until its place is needed; the one unused longest goes first.
    """

    def __init__(self, n: int, size: int) -> None:
        self.size = size
        """Positions of a block."""
        self._n = n
        self._free = list(range(n, 0, -1))
        self._holders = [0] * (n + 1)
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._by_name: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}
        self._records: dict[int, Record] = {}

    def __len__(self) -> int:
        """All blocks there are."""
        return self._n

    @property
    def available(self) -> int:
        """Blocks that can be taken."""
        return len(self._free) + len(self._idle)

    def needed(self, positions: int) -> int:
        """Blocks that so many positions fill."""
        return -(-positions // self.size)

    def take(self) -> int:
        """A block for one holder; whatever name it had is forgotten. Raises IndexError if none is available."""
        if self._free:
            block = self._free.pop()
        elif self._idle:
            block = next(iter(self._idle))
            self.forget(block)
            block = self._free.pop()
        else:
            raise IndexError("no block is available")
        self._holders[block] = 1
        return block

    def hold(self, block: int) -> None:
        """One more holder."""
        self._holders[block] += 1
        self._idle.pop(block, None)

    def release(self, block: int) -> bool:
        """One holder less. True if it was the last one."""
        self._holders[block] -= 1
        if self._holders[block]:
            return False
        if block in self._names:
            self._idle[block] = None
        else:
            self._free.append(block)
        return True

    def find(self, name: bytes) -> int | None:
        """The block of a name."""
        return self._by_name.get(name)

    def record(self, block: int) -> Record | None:
        """What was measured while it was computed."""
        return self._records.get(block)

    def name(self, block: int, name: bytes, record: Record | None) -> None:
        """Make a full block findable. Of two with the same content the first keeps the name."""
        if self._by_name.setdefault(name, block) == block:
            self._names[block] = name
            if record is not None:
                self._records[block] = record

    def forget(self, block: int) -> None:
        """Take the name of a block away: its content is not to be found any more."""
        name = self._names.pop(block, None)
        if name is not None:
            del self._by_name[name]
            self._records.pop(block, None)
        if block in self._idle:
            del self._idle[block]
            self._free.append(block)


def chain(tokens: Sequence[int], size: int, marks: Sequence[bytes], salt: bytes = b"") -> tuple[bytes, ...]:
    """Names of the first len(marks) blocks of a sequence.

    marks: what steers each block, empty where nothing does. A name covers all before it: what a token's keys and values
    depend on. salt: what else tells caches apart. SHA-256, so that nobody can make two prefixes of one name.
    """
    names = []
    digest = hashlib.sha256(salt).digest()
    for i, mark in enumerate(marks):
        ids = np.asarray(tokens[i * size : (i + 1) * size], dtype=np.int64).tobytes()
        digest = hashlib.sha256(digest + ids + mark).digest()
        names.append(digest)
    return tuple(names)
