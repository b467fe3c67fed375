"""Every token of every request is computed, finds all before it in its blocks, and is drawn once."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from steering.runtime import blocks as blocks_module
from steering.runtime import scheduler as scheduler_module
from steering.runtime import scope
from steering.runtime.blocks import Blocks, chain
from steering.runtime.request import Request, Sampling
from steering.runtime.scheduler import Batch, Scheduler, Sequence

SIZE = 4


def sequence(name: str, n_prompt: int, n_rows: int = 1) -> Sequence:
    return Sequence(Request(name, tuple(range(1, n_prompt + 1)), Sampling()), n_rows)


def scheduler(rows: int, budget: int, blocks: int = 1000) -> Scheduler:
    return Scheduler(rows, budget, Blocks(blocks, SIZE))


class Pool:
    """What a device would hold: at every place of every block, all that its keys and values depend on."""

    def __init__(self) -> None:
        self.places: dict[tuple[int, int], tuple[object, ...]] = {}

    def run(self, batch: Batch, steered_from: dict[str, int]) -> None:
        """Compute a batch: write its tokens, and check that each finds what it attends to."""
        for segment in batch.segments:
            own = tuple(self.past(segment.sequence, segment.is_shadow, steered_from))
            for at in range(segment.start, segment.start + segment.length):
                self.places[segment.table[at // SIZE], at % SIZE] = own[: at + 1]
        for segment in batch.segments:
            own = tuple(self.past(segment.sequence, segment.is_shadow, steered_from))
            for at in range(segment.start + segment.length):
                assert self.places[segment.table[at // SIZE], at % SIZE] == own[: at + 1]

    @staticmethod
    def past(one: Sequence, is_shadow: bool, steered_from: dict[str, int]) -> list[object]:
        first = len(one.tokens) if is_shadow else steered_from[one.request.id]
        return [(token, one.request.id if at >= first else "") for at, token in enumerate(one.tokens)]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 30), st.integers(0, 3), st.integers(0, 30), st.integers(1, 9), st.integers(1, 2)),
        min_size=1,
        max_size=10,
    ),
    st.integers(2, 5),
    st.integers(2, 20),
    st.integers(0, 20),
    st.booleans(),
)
def test_every_token_finds_what_it_attends_to_whoever_computed_it(
    jobs: list[tuple[int, int, int, int, int]], rows: int, budget: int, spare: int, shares: bool
) -> None:
    """Prompts share beginnings; blocks run short; every request still draws all its tokens, and none is lost."""
    most = max(k * -(-(n + out) // SIZE) for n, _, _, out, k in jobs)
    blocks: Blocks[object] = Blocks(most + spare, SIZE)
    queue, pool = Scheduler(rows, budget, blocks), Pool()
    sequences, steered_from = {}, {}
    for i, (n_prompt, family, change, _, k) in enumerate(jobs):
        prompt = tuple(family if at < change else 10 + at + family for at in range(n_prompt))
        one = Sequence(Request(str(i), prompt, Sampling()), k)
        steered_from[str(i)] = first = change % (n_prompt + 3)
        if shares:
            n = (n_prompt - 1) // SIZE
            marks = [b"" if (b + 1) * SIZE <= first else str(i).encode() for b in range(n)]
            one.names = (chain(prompt, SIZE, marks), chain(prompt, SIZE, [b""] * n))[:k]
        sequences[str(i)] = one
        queue.add(one)
    for _ in range(3000):
        if (batch := queue.step()) is None:
            break
        assert sum(one.n_rows for one in queue.running.values()) <= rows
        assert batch.n_tokens <= max(budget, batch.n_decode + min(SIZE, budget))
        assert [s.offset for s in batch.segments] == [
            sum(t.length for t in batch.segments[:i]) for i in range(len(batch.segments))
        ]
        pool.run(batch, steered_from)
        drawn = {s.sequence.request.id: 100 + s.sequence.n_generated for s in batch.segments if s.samples}
        queue.commit(batch, drawn)
        for name in drawn:
            if sequences[name].n_generated == jobs[int(name)][3]:
                queue.remove(name)
    assert len(queue) == 0
    assert blocks.available == len(blocks)
    for i, (*_, out, _) in enumerate(jobs):
        assert sequences[str(i)].generated == [100 + j for j in range(out)]


def test_a_prompt_is_read_once_by_all_who_have_it() -> None:
    queue = scheduler(4, 100)
    for name in "abc":
        one = sequence(name, 11)
        one.names = (chain(one.tokens, SIZE, [b""] * 2),)
        queue.add(one)
    seen = []
    for _ in range(2):
        batch = queue.step()
        assert batch is not None
        seen.append([(s.sequence.request.id, s.start, s.length) for s in batch.segments])
        queue.commit(batch, {s.sequence.request.id: 0 for s in batch.segments if s.samples})
    assert seen == [[("a", 0, 8)], [("a", 8, 3), ("b", 8, 3), ("c", 8, 3)]]
    assert [one.cached for one in queue.running.values()] == [0, 8, 8]


def test_a_twin_computes_only_what_is_steered() -> None:
    queue = scheduler(2, 100)
    one = sequence("a", 11, n_rows=2)
    clean = chain(one.tokens, SIZE, [b""] * 2)
    one.names = (clean, clean)
    queue.add(one)
    seen = []
    for _ in range(2):
        batch = queue.step()
        assert batch is not None
        seen.append([(s.row, s.start, s.length) for s in batch.segments])
        queue.commit(batch, {"a": 0} if any(s.samples for s in batch.segments) else {})
    assert seen == [[(0, 0, 8)], [(0, 8, 3), (1, 8, 3)]]
    own, shadow = one.tables
    assert own[:2] == shadow[:2]
    assert own[2] != shadow[2]


def test_who_came_last_makes_room_and_comes_back_first() -> None:
    queue = scheduler(3, 100, blocks=4)
    for name in "ab":
        queue.add(sequence(name, 7))
    queue.add(sequence("c", 2))
    for _ in range(2):
        batch = queue.step()
        assert batch is not None
        queue.commit(batch, {s.sequence.request.id: 0 for s in batch.segments if s.samples})
    assert queue.n_preempted == 0
    batch = queue.step()
    assert batch is not None
    assert [(s.sequence.request.id, s.start) for s in batch.segments] == [("a", 8)]
    assert (queue.n_preempted, [s.request.id for s in queue.waiting]) == (1, ["b", "c"])
    queue.commit(batch, {"a": 0})
    queue.remove("a")
    batch = queue.step()
    assert batch is not None
    assert [(s.sequence.request.id, s.start, s.length) for s in batch.segments] == [("b", 0, 9), ("c", 0, 2)]
    assert batch.n_prompt_tokens == 2  # those of "b" were counted when they were first read


def test_who_may_not_start_holds_back_those_behind() -> None:
    queue = scheduler(3, 100)
    for name in "ab":
        queue.add(sequence(name, 2))
    assert queue.step(lambda s: s.request.id == "b") is None
    assert len(queue.waiting) == 2
    queue.remove("b")
    assert len(queue.waiting) == 1
    batch = queue.step()
    assert batch is not None
    assert [s.sequence.request.id for s in batch.segments] == ["a"]


def test_a_block_that_is_half_in_the_receipt_is_read_again_rather_than_taken_over() -> None:
    """Or its record, which tells of the whole block, would count the first half twice."""
    queue = scheduler(2, 100)
    names = chain(range(1, 12), SIZE, [b"steered"] * 2)
    for name, counted in (("a", 0), ("b", 6)):
        one = sequence(name, 11)
        one.names, one.counted = (names,), counted
        queue.add(one)
        batch = queue.step()
        assert batch is not None
        queue.commit(batch, {}, lambda _, start: f"record of {start}")
    assert [(s.sequence.request.id, s.start, s.length) for s in batch.segments] == [("a", 8, 3), ("b", 4, 4)]
    assert (one.inherited, one.counted) == ([], 8)


def test_decoding_goes_on_while_a_long_prompt_is_read() -> None:
    queue = scheduler(2, 5)
    queue.add(sequence("a", 1))
    batch = queue.step()
    assert batch is not None
    queue.commit(batch, {"a": 7})
    queue.add(sequence("b", 20))
    for _ in range(4):
        batch = queue.step()
        assert batch is not None
        assert [(s.sequence.request.id, s.length) for s in batch.segments] == [("a", 1), ("b", 4)]
        queue.commit(batch, {"a": 7})


def test_prompts_are_read_however_many_decode() -> None:
    queue = scheduler(8, 4)
    for name in "abcdef":
        queue.add(sequence(name, 1))
    read = 0
    for _ in range(6):
        if len(queue.running) == 6 and not queue.waiting:
            queue.add(sequence("late", 9))
        batch = queue.step()
        assert batch is not None
        read += sum(s.length for s in batch.segments if s.sequence.request.id == "late")
        queue.commit(batch, {s.sequence.request.id: 0 for s in batch.segments if s.samples})
    assert read >= 9


def test_a_batch_splits_into_its_requests() -> None:
    a, b = sequence("a", 3, 2), sequence("b", 1)
    batch = Batch.pack([(a, 0, 3), (b, 0, 1)], SIZE)
    assert [(s.sequence, s.row, s.offset) for s in batch.segments] == [(b, 0, 0), (a, 0, 1), (a, 1, 4)]
    assert (batch.n_tokens, batch.n_prompt_tokens) == (7, 4)
    parts = list(batch.split(SIZE))
    assert [[(s.sequence, s.row) for s in part.segments] for part in parts] == [[(b, 0)], [(a, 0), (a, 1)]]


def test_scheduler_and_scope_name_no_torch() -> None:
    for module in (blocks_module, scheduler_module, scope):
        assert "import torch" not in Path(module.__file__ or "").read_text()


def test_a_request_that_only_reads_never_samples_and_is_judged_once_at_each_position() -> None:
    queue = scheduler(2, 4)
    read = Sequence(Request("r", tuple(range(10)), Sampling(max_tokens=0, prompt_logprobs=0)), n_rows=2)
    queue.add(read)
    judged: list[int] = []
    ends = []
    while (batch := queue.step()) is not None:
        assert not any(segment.samples for segment in batch.segments)
        assert all(len(segment.judged) == 0 for segment in batch.segments if segment.is_shadow)
        judged += [position for segment in batch.segments for position in segment.judged]
        ends.append(any(segment.ends_unsampled for segment in batch.segments))
        queue.commit(batch, {})
    assert judged == list(range(9))
    assert ends == [False, False, False, False, True]


def test_only_the_prompt_of_a_request_that_asks_is_judged() -> None:
    queue = scheduler(2, 8)
    asks = Sequence(Request("a", (1, 2, 3), Sampling(prompt_logprobs=0)))
    queue.add(asks)
    queue.add(sequence("b", 3))
    batch = queue.step()
    assert batch is not None
    assert [(s.sequence.request.id, list(s.judged), s.samples) for s in batch.segments] == [
        ("a", [0, 1], True),
        ("b", [], True),
    ]
    queue.commit(batch, {"a": 0, "b": 0})
    batch = queue.step()
    assert batch is not None
    assert not any(s.judged or s.ends_unsampled for s in batch.segments)
