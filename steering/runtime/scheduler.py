"""Which tokens run in the next step, and in which blocks their keys and values lie. No torch here.

A request is nothing but `computed` catching up with its known tokens: while the prompt is being read several tokens a
step, afterwards one. Every step takes one token of each request that decodes, then fills what is left of the token
budget, and in any case one block, with chunks of prompts, first come first served.

What the prefix cache holds of a prompt is taken over, and what another request of this very step computes is waited
for, so that the twin of a comparison and the n choices of a request read their prompt once. The last token is always
computed, and so is all behind the last full block, in a step of its own whether the rest was found or not: a request
gives the same numbers either way.

When blocks run out, the request that was admitted last gives its blocks back and reads all its tokens again later.

A sequence has one row of keys and values, or two when an unsteered shadow runs beside it (`Guard.max_kl`): the shadow
is fed the same tokens, and shares the row's blocks as long as nothing steers them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from steering.runtime.blocks import Blocks
from steering.runtime.request import Request


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on its way: known tokens, how many of them are in the cache, and the blocks of its rows.

    names: by row, the names of the prompt's blocks that may be shared. cached: positions that were taken over.
    counted: positions whose measurements are in the receipt; more than `computed` only where they are read again.
    inherited: what was measured in blocks that were taken over, not yet in the receipt.
    """

    request: Request
    n_rows: int = 1
    tokens: list[int] = field(default_factory=list)
    tables: tuple[list[int], ...] = ()
    names: tuple[tuple[bytes, ...], ...] = ()
    computed: int = 0
    cached: int = 0
    counted: int = 0
    inherited: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)
        self.tables = tuple([] for _ in range(self.n_rows))

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

    @property
    def n_shareable(self) -> int:
        """Blocks of the prompt that have a name."""
        return len(self.names[0]) if self.names else 0

    @property
    def n_common(self) -> int:
        """Blocks at the start that all its rows have in common."""
        if self.n_rows == 1 or not self.names:
            return 0
        own, shadow = self.names
        return next((i for i, (a, b) in enumerate(zip(own, shadow, strict=True)) if a != b), len(own))


class Segment(NamedTuple):
    """Consecutive tokens of one sequence that run in a step, in one row; `offset` is their place in the batch."""

    sequence: Sequence
    row: int
    start: int
    length: int
    offset: int

    @property
    def is_shadow(self) -> bool:
        """Whether it is the unsteered twin of another row."""
        return self.row > 0

    @property
    def table(self) -> list[int]:
        """The blocks of its row."""
        return self.sequence.tables[self.row]

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
        first = max(self.start, self.sequence.counted)
        return range(first, max(first, min(self.start + self.length, self.sequence.n_prompt - 1)))

    @property
    def end(self) -> int:
        """Where its last token lies in the packed batch."""
        return self.offset + self.length - 1


@dataclass(frozen=True, slots=True)
class Batch:
    """The segments of one step: `n_decode` of one token each, then longer ones."""

    segments: tuple[Segment, ...]
    n_decode: int
    n_tokens: int

    @classmethod
    def pack(cls, pieces: list[tuple[Sequence, int, int]], size: int) -> Batch:
        """Lay out (sequence, start, length) pieces, each once for every row that has to compute it.

        `size` is that of a block: what lies within the blocks that the rows have in common is computed once.
        """
        flat = []
        for sequence, start, length in pieces:
            is_common = start + length <= sequence.n_common * size
            flat += [(sequence, row, start, length) for row in range(1 if is_common else sequence.n_rows)]
        flat.sort(key=lambda piece: piece[3] > 1)
        segments, offset = [], 0
        for sequence, row, start, length in flat:
            segments.append(Segment(sequence, row, start, length, offset))
            offset += length
        return cls(tuple(segments), sum(s.length == 1 for s in segments), offset)

    @property
    def n_prompt_tokens(self) -> int:
        """Tokens of prompts that are read for the first time, shadows left out."""
        real = (s for s in self.segments if not s.is_shadow)
        return sum(
            max(0, min(s.sequence.n_prompt, s.start + s.length) - max(s.start, s.sequence.counted)) for s in real
        )

    def only(self, segments: tuple[Segment, ...]) -> Batch:
        """Some of its segments, where they lie."""
        return Batch(segments, sum(s.length == 1 for s in segments), self.n_tokens)

    def split(self, size: int) -> Iterator[Batch]:
        """One batch per sequence: what is retried when a step fails as a whole."""
        pieces = {id(s.sequence): (s.sequence, s.start, s.length) for s in self.segments}
        for piece in pieces.values():
            yield Batch.pack([piece], size)


class Scheduler:
    """Waiting and running sequences, and the blocks that they hold.

    n_rows: rows that may run at once. Every sequence alone must fit in the pool.
    """

    def __init__(self, n_rows: int, max_step_tokens: int, blocks: Blocks[Any]) -> None:
        self.waiting: deque[Sequence] = deque()
        self.running: dict[str, Sequence] = {}
        self.n_cached = 0
        """Positions of prompts that were taken over since the start."""
        self.n_preempted = 0
        """Times that a sequence gave its blocks back since the start."""
        self._blocks = blocks
        self._n_rows = n_rows
        self._max_step_tokens = max_step_tokens

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(sequence)

    def remove(self, request_id: str, *, is_spoilt: bool = False) -> list[int]:
        """Take a sequence out, wherever it is, and free its blocks.

        is_spoilt: its keys and values may not be finite. What only it holds is forgotten then, and returned, for the
        caller to clear.
        """
        sequence = self.running.pop(request_id, None)
        if sequence is not None:
            return self._free(sequence, is_spoilt)
        for sequence in self.waiting:
            if sequence.request.id == request_id:
                self.waiting.remove(sequence)
                break
        return []

    def step(self, admit: Callable[[Sequence], bool] = lambda _: True) -> Batch | None:
        """The next batch, None when nothing is left to do.

        `admit` is asked for each sequence that could start; on False it and those behind it wait on.
        """
        self._start(admit)
        pieces = self._decode()
        self._read(pieces)
        return Batch.pack(pieces, self._blocks.size) if pieces else None

    def follow(self, batch: Batch, keep: Iterable[int], n_present: int, *, makes_room: bool) -> Batch | None:
        """The decode step after `batch`, whose tokens are not known yet, for those of its segments that go on.

        None if there is more to decide: somebody may start now or then, runs and is not among the `n_present` of the
        batch that do, or needs a block that nobody has to spare. makes_room: whether somebody ends with this batch.
        """
        if len(self.running) != n_present:
            return None
        if self.waiting:
            n_rows = sum(sequence.n_rows for sequence in self.running.values())
            if makes_room or n_rows + self.waiting[0].n_rows <= self._n_rows:
                return None
        segments = []
        for offset, i in enumerate(keep):
            sequence, start = batch.segments[i].sequence, batch.segments[i].start + 1
            if self._lacks(sequence, start + 1 - sequence.computed):
                return None
            self._extend(sequence, start + 1 - sequence.computed)
            segments.append(Segment(sequence, 0, start, 1, offset))
        return Batch(tuple(segments), len(segments), len(segments)) if segments else None

    def commit(
        self, batch: Batch, drawn: dict[str, int], record: Callable[[Segment, int], object | None] = lambda *_: None
    ) -> None:
        """Record what a step computed and the tokens drawn from it, by request id.

        `record(segment, start)` is what was measured in the block that starts at this position, None if nothing was.
        """
        size = self._blocks.size
        for segment in batch.segments:
            sequence, end = segment.sequence, segment.start + segment.length
            if sequence.request.id not in self.running:
                continue
            for block in range(-(-segment.start // size), min(end // size, sequence.n_shareable)):
                held = None if segment.is_shadow else record(segment, block * size)
                self._blocks.name(segment.table[block], sequence.names[segment.row][block], held)
            if not segment.is_shadow:
                sequence.computed = end
                sequence.counted = max(sequence.counted, end)
        for request_id, token in drawn.items():
            if request_id in self.running:
                self.running[request_id].tokens.append(token)

    def _start(self, admit: Callable[[Sequence], bool]) -> None:
        """Move sequences from waiting to running while there are rows, and blocks to read their tokens."""
        n_rows = sum(sequence.n_rows for sequence in self.running.values())
        promised = sum(self._missing(sequence) for sequence in self.running.values())
        while self.waiting:
            head = self.waiting[0]
            wanted = self._missing(head) + promised
            if n_rows + head.n_rows > self._n_rows or (self.running and wanted > self._blocks.available):
                return
            if not admit(head):
                return
            self.running[head.request.id] = self.waiting.popleft()
            n_rows, promised = n_rows + head.n_rows, wanted

    def _missing(self, sequence: Sequence) -> int:
        """Blocks that its known tokens still need; those that the cache may have are counted too."""
        wanted = self._blocks.needed(len(sequence.tokens))
        return sum(max(0, wanted - len(table)) for table in sequence.tables)

    def _decode(self) -> list[tuple[Sequence, int, int]]:
        """A piece of one token for each sequence that decodes; those admitted last make room if need be."""
        pieces = []
        for sequence in list(self.running.values()):
            if sequence.request.id not in self.running or len(sequence.tokens) - sequence.computed != 1:
                continue
            while self._lacks(sequence, 1):
                *_, last = self.running.values()
                self._preempt(last)
                if last is sequence:
                    break
            else:
                self._extend(sequence, 1)
                pieces.append((sequence, sequence.computed, 1))
        return pieces

    def _read(self, pieces: list[tuple[Sequence, int, int]]) -> None:
        """Add chunks of the sequences that have more than one token to catch up with."""
        size = self._blocks.size
        budget = self._max_step_tokens
        left = max(budget - sum(sequence.n_rows for sequence, _, _ in pieces), min(size, budget))
        coming: set[bytes] = set()
        for sequence in list(self.running.values()):
            if sequence.request.id not in self.running or len(sequence.tokens) - sequence.computed < 2:
                continue
            self._adopt(sequence)
            start = sequence.computed
            if (
                start % size == 0
                and start // size < sequence.n_shareable
                and sequence.names[0][start // size] in coming
            ):
                continue
            length = self._chunk(sequence, left)
            while not pieces and self._lacks(sequence, length):
                *_, last = self.running.values()
                if last is sequence:  # alone it fits: those before it are all that is left to wait for
                    break
                self._preempt(last)
            if length < 1 or self._lacks(sequence, length):
                break
            self._extend(sequence, length)
            pieces.append((sequence, start, length))
            left -= length * sequence.n_rows
            if sequence.names:
                coming.update(sequence.names[0][start // size : (start + length) // size])

    def _chunk(self, sequence: Sequence, left: int) -> int:
        """Tokens of a sequence to read now: up to a bound that must not be crossed, in whole blocks if it can be."""
        size, start = self._blocks.size, sequence.computed
        bounds = [len(sequence.tokens), sequence.n_shareable * size, sequence.n_common * size]
        bound = min(b for b in bounds if b > start)
        length = min(bound - start, left // sequence.n_rows)
        if start + length < bound and (whole := (start + length) // size * size - start) > 0:
            length = whole
        return length

    def _adopt(self, sequence: Sequence) -> None:
        """Take over what the cache holds of the prompt from where the sequence stands."""
        size = self._blocks.size
        while sequence.computed % size == 0 and (at := sequence.computed // size) < sequence.n_shareable:
            found = [self._blocks.find(names[at]) for names in sequence.names]
            is_split = at * size < sequence.counted < (at + 1) * size  # a part of what its record tells is counted
            if is_split or any(len(table) > at for table in sequence.tables) or None in found:
                return
            for table, block in zip(sequence.tables, found, strict=True):
                assert block is not None
                self._blocks.hold(block)
                table.append(block)
            sequence.computed += size
            if sequence.computed > sequence.counted:
                record = self._blocks.record(sequence.tables[0][-1])
                sequence.inherited += [] if record is None else [record]
                sequence.counted = sequence.computed
                sequence.cached += size
                self.n_cached += size

    def _lacks(self, sequence: Sequence, length: int) -> bool:
        """Whether there are too few blocks for its next `length` tokens."""
        wanted = self._blocks.needed(sequence.computed + length)
        n_rows = 1 if sequence.computed + length <= sequence.n_common * self._blocks.size else sequence.n_rows
        return sum(max(0, wanted - len(table)) for table in sequence.tables[:n_rows]) > self._blocks.available

    def _extend(self, sequence: Sequence, length: int) -> None:
        """Give a sequence the blocks of its next `length` tokens."""
        wanted, n_common = self._blocks.needed(sequence.computed + length), sequence.n_common
        own, *shadows = sequence.tables
        while len(own) < wanted:
            own.append(self._blocks.take())
        for shadow in shadows:
            while len(shadow) < wanted:
                if len(shadow) < n_common:
                    self._blocks.hold(own[len(shadow)])
                    shadow.append(own[len(shadow)])
                else:
                    shadow.append(self._blocks.take())

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence's blocks away; it is the next to be admitted, and reads all its tokens again."""
        del self.running[sequence.request.id]
        self._free(sequence, is_spoilt=False)
        sequence.computed = 0
        self.waiting.appendleft(sequence)
        self.n_preempted += 1

    def _free(self, sequence: Sequence, is_spoilt: bool) -> list[int]:
        """Release all blocks, the last ones first, so that the cache loses the ends of prefixes before their starts."""
        spoilt = []
        for table in sequence.tables:
            for block in reversed(table):
                if self._blocks.release(block) and is_spoilt:
                    self._blocks.forget(block)
                    spoilt.append(block)
            table.clear()
        return spoilt
