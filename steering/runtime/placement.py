"""Where a step's tokens lie: ids, positions, places in the pool, and what each token may attend to.

Made on the host in numpy and brought to the device in two copies. Legend: T tokens of the packed batch · N single
tokens, which attend through block tables · M blocks of the longest table among them · P positions of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from steering.runtime.scheduler import Batch, Segment
from steering.runtime.transfer import upload


@dataclass(frozen=True, slots=True)
class Span:
    """A segment of more than one token: where it starts in its row and in the batch, and the blocks up to its end."""

    start: int
    length: int
    offset: int
    block_M: Tensor | None
    """None where all that it attends to is computed in this very step."""


class Laid(NamedTuple):
    """Where a step's tokens lie, on the host.

    layout_3T: ids, positions and places in the pool. tables_NM: of each single token its row's blocks, and in the last
    column its keys. spans: of each longer segment its start, length, offset, and the blocks up to its end, none where
    all that it attends to is computed in this very step.
    """

    layout_3T: np.ndarray
    tables_NM: np.ndarray
    spans: tuple[tuple[int, int, int, list[int]], ...]

    @classmethod
    def of(cls, batch: Batch, size: int, *, is_known: bool = True) -> Laid:
        """A packed batch in blocks of `size` positions; ids are 0 where the host does not know them yet."""
        n = batch.n_decode
        single, longer = batch.segments[:n], batch.segments[n:]
        layout_3T = np.empty((3, batch.n_tokens), dtype=np.int64)
        layout_3T[:, :n] = layout_of(single, size, is_known=is_known)
        spans = []
        for segment in longer:
            at, end = slice(segment.offset, segment.offset + segment.length), segment.start + segment.length
            layout_3T[0, at] = segment.sequence.tokens[segment.start : end]
            layout_3T[1, at] = np.arange(segment.start, end)
            layout_3T[2, at] = np.asarray(segment.table)[layout_3T[1, at] // size]
            layout_3T[2, at] = layout_3T[2, at] * size + layout_3T[1, at] % size
            blocks = segment.table[: -(-end // size)] if segment.start else []
            spans.append((segment.start, segment.length, segment.offset, blocks))
        return cls(layout_3T, tables_of(single, size), tuple(spans))


@dataclass(slots=True)
class Placement:
    """A step's tokens on the device; masks are made once per step and window."""

    ids_T: Tensor
    position_T: Tensor
    at_T: Tensor
    """Place of every token in the pool: block · P + position within it."""
    n_decode: int
    table_NM: Tensor
    """int32 blocks of each single token's row, 0 behind its last one."""
    length_N: Tensor
    """int32 keys of each single token, itself included."""
    spans: tuple[Span, ...]
    masks: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, laid: Laid, device: torch.device, drawn_T: Tensor | None = None) -> Placement:
        """The placement of a step. drawn_T: the ids of its tokens, where they are on the device only."""
        ids_3T = upload(laid.layout_3T, device)
        table_NM, length_N = upload(laid.tables_NM, device).tensor_split([-1], dim=1)
        ids_T = ids_3T[0] if drawn_T is None else drawn_T
        spans = tuple(
            Span(start, length, offset, upload(blocks, device) if blocks else None)
            for start, length, offset, blocks in laid.spans
        )
        return cls(ids_T, ids_3T[1], ids_3T[2], len(laid.tables_NM), table_NM, length_N[:, 0], spans)

    def span_mask(self, span: Span, window: int | None, dtype: torch.dtype) -> Tensor:
        """Additive (length, start + length): causal behind a prefix of `start` positions."""
        key = (span.start, span.length, window, dtype)
        if key not in self.masks:
            at = torch.arange(span.start + span.length, device=self.at_T.device)
            query = at[span.start :, None]
            seen = at <= query
            if window is not None:
                seen &= at > query - window
            self.masks[key] = additive(seen, dtype)
        return self.masks[key]


def layout_of(single: Sequence[Segment], size: int, *, is_known: bool = True) -> np.ndarray:
    """(3, N): ids, positions and places of single tokens; ids are 0 where they are not known."""
    layout_3N = np.zeros((3, len(single)), dtype=np.int64)
    if is_known:
        layout_3N[0] = [s.sequence.tokens[s.start] for s in single]
    layout_3N[1] = [s.start for s in single]
    layout_3N[2] = [s.table[s.start // size] for s in single]
    layout_3N[2] = layout_3N[2] * size + layout_3N[1] % size
    return layout_3N


def tables_of(single: Sequence[Segment], size: int) -> np.ndarray:
    """(N, M + 1) int32: the blocks of each token's row, 0 behind the last one, and in the last column its keys."""
    width = max((s.start // size + 1 for s in single), default=0)
    tables = np.zeros((len(single), width + 1), dtype=np.int32)
    for row, segment in zip(tables, single, strict=True):
        row[: segment.start // size + 1] = segment.table[: segment.start // size + 1]
        row[width] = segment.start + 1
    return tables


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `seen`, −inf elsewhere. Made once a step: attention would convert a boolean mask again in every layer."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
