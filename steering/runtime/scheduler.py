"""Which tokens run in the next step. No torch here.

A request is nothing but `computed` catching up with its known tokens: while the prompt is being read several tokens a
step, afterwards one. Every step takes one token of each request that decodes, then fills what is left of the token
budget with chunks of prompts, first come first served.

A sequence holds one row of the key/value cache, or two when an unsteered shadow runs beside it (`Guard.max_kl`): the
shadow is fed the same tokens in its own row.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from steering.runtime.request import Request


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on its way: known tokens, how many of them are in the cache, and the rows that hold them."""

    request: Request
    n_rows: int = 1
    tokens: list[int] = field(default_factory=list)
    rows: tuple[int, ...] = ()
    computed: int = 0

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)

    @property
    def n_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt)

    @property
    def n_generated(self) -> int:
        """Tokens drawn so far."""
        return len(self.tokens) - self.n_prompt

    @property
    def generated(self) -> list[int]:
        """The tokens drawn so far."""
        return self.tokens[self.n_prompt :]


class Segment(NamedTuple):
    """Consecutive tokens of one sequence that run in a step, in one row; `offset` is their place in the batch."""

    sequence: Sequence
    row: int
    start: int
    length: int
    offset: int
    is_shadow: bool

    @property
    def samples(self) -> bool:
        """Whether the last token's logits give the next token."""
        return self.start + self.length == len(self.sequence.tokens) and self.sequence.request.sampling.max_tokens > 0

    @property
    def ends_unsampled(self) -> bool:
        """Whether it is the end of a prompt after which nothing is drawn."""
        return self.start + self.length == self.sequence.n_prompt and self.sequence.request.sampling.max_tokens == 0

    @property
    def judged(self) -> range:
        """Positions whose logits tell how likely the prompt's next token was, if that was asked for."""
        if self.is_shadow or self.sequence.request.sampling.prompt_logprobs is None:
            return range(0)
        return range(self.start, min(self.start + self.length, self.sequence.n_prompt - 1))

    @property
    def end(self) -> int:
        """Where its last token lies in the packed batch."""
        return self.offset + self.length - 1


@dataclass(frozen=True, slots=True)
class Batch:
    """The segments of one step: `n_decode` of one token each, ordered by row, then longer ones."""

    segments: tuple[Segment, ...]
    n_decode: int
    n_tokens: int

    @classmethod
    def pack(cls, pieces: list[tuple[Sequence, int, int]]) -> Batch:
        """Lay out (sequence, start, length) pieces, each once for every row of its sequence."""
        flat = [(s, row, start, n, i > 0) for s, start, n in pieces for i, row in enumerate(s.rows)]
        flat.sort(key=lambda piece: (piece[3] > 1, piece[1]))
        segments, offset = [], 0
        for sequence, row, start, length, is_shadow in flat:
            segments.append(Segment(sequence, row, start, length, offset, is_shadow))
            offset += length
        return cls(tuple(segments), sum(s.length == 1 for s in segments), offset)

    @property
    def n_prompt_tokens(self) -> int:
        """Tokens of prompts among them, shadows left out."""
        real = (s for s in self.segments if not s.is_shadow)
        return sum(max(0, min(s.sequence.n_prompt - s.start, s.length)) for s in real)

    def split(self) -> Iterator[Batch]:
        """One batch per sequence: what is retried when a step fails as a whole."""
        pieces = {id(s.sequence): (s.sequence, s.start, s.length) for s in self.segments}
        for piece in pieces.values():
            yield Batch.pack([piece])


class Scheduler:
    """Waiting and running sequences, and the free rows. Rows are handed out lowest first, so that those in use stay
    together at the front of the cache."""

    def __init__(self, n_rows: int, max_step_tokens: int) -> None:
        self.waiting: deque[Sequence] = deque()
        self.running: dict[str, Sequence] = {}
        self._free = list(range(n_rows))
        self._max_step_tokens = max_step_tokens

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(sequence)

    def remove(self, request_id: str) -> Sequence | None:
        """Take a sequence out, wherever it is, and free its rows. None if there is none of this id."""
        sequence = self.running.pop(request_id, None)
        if sequence is not None:
            for row in sequence.rows:
                heapq.heappush(self._free, row)
            return sequence
        for sequence in self.waiting:
            if sequence.request.id == request_id:
                self.waiting.remove(sequence)
                return sequence
        return None

    def step(self, admit: Callable[[Sequence], bool] = lambda _: True) -> Batch | None:
        """The next batch, None when nothing is left to do.

        `admit` is asked for each sequence that could start; on False it and those behind it wait on.
        """
        while self.waiting and self.waiting[0].n_rows <= len(self._free) and admit(self.waiting[0]):
            sequence = self.waiting.popleft()
            sequence.rows = tuple(heapq.heappop(self._free) for _ in range(sequence.n_rows))
            self.running[sequence.request.id] = sequence

        reading = [s for s in self.running.values() if len(s.tokens) - s.computed > 1]
        pieces = [(s, s.computed, 1) for s in self.running.values() if len(s.tokens) - s.computed == 1]
        left = self._max_step_tokens - sum(s.n_rows for s, _, _ in pieces)
        for sequence in reading:
            length = min(len(sequence.tokens) - sequence.computed, left // sequence.n_rows)
            if length < 1 and pieces:
                break
            pieces.append((sequence, sequence.computed, max(length, 1)))
            left -= max(length, 1) * sequence.n_rows
        return Batch.pack(pieces) if pieces else None

    def commit(self, batch: Batch, drawn: dict[str, int]) -> None:
        """Record what a step computed and the tokens drawn from it, by request id."""
        for segment in batch.segments:
            if not segment.is_shadow and segment.sequence.request.id in self.running:
                segment.sequence.computed = segment.start + segment.length
        for request_id, token in drawn.items():
            if request_id in self.running:
                self.running[request_id].tokens.append(token)
