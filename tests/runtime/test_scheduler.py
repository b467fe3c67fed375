"""Every token of every request is computed once, in order, in a row that nobody else has."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from steering.runtime import scheduler, scope
from steering.runtime.request import Request, Sampling
from steering.runtime.scheduler import Batch, Scheduler, Sequence


def sequence(name: str, n_prompt: int, n_rows: int = 1) -> Sequence:
    return Sequence(Request(name, tuple(range(1, n_prompt + 1)), Sampling()), n_rows)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 6), st.integers(1, 2)), min_size=1, max_size=12),
    st.integers(2, 5),
    st.integers(2, 20),
)
def test_a_run_computes_every_token_once_in_its_own_row(
    jobs: list[tuple[int, int, int]], rows: int, budget: int
) -> None:
    queue = Scheduler(rows, budget)
    sequences = {str(i): sequence(str(i), n, k) for i, (n, _, k) in enumerate(jobs)}
    for one in sequences.values():
        queue.add(one)
    computed: dict[tuple[str, bool], list[int]] = {}
    started: list[str] = []
    while (batch := queue.step()) is not None:
        taken = [s.row for s in batch.segments]
        assert len(set(taken)) == len(taken)
        assert max(taken) < rows
        prompts = sum(s.length for s in batch.segments if s.length > 1)
        assert prompts <= max(budget - batch.n_decode, 2) or batch.n_decode == 0
        singles = [s.row for s in batch.segments[: batch.n_decode]]
        assert singles == sorted(singles)
        assert [s.offset for s in batch.segments] == [
            sum(t.length for t in batch.segments[:i]) for i in range(len(batch.segments))
        ]
        drawn = {}
        for s in batch.segments:
            name = s.sequence.request.id
            if name not in started:
                started.append(name)
            computed.setdefault((name, s.is_shadow), []).extend(range(s.start, s.start + s.length))
            if s.samples and not s.is_shadow:
                drawn[name] = 0
        queue.commit(batch, drawn)
        for name in drawn:
            if sequences[name].n_generated == jobs[int(name)][1]:
                assert queue.remove(name) is sequences[name]
    assert len(queue) == 0
    for i, (n_prompt, n_out, k) in enumerate(jobs):
        for is_shadow in (False, True)[:k]:
            assert computed[str(i), is_shadow] == list(range(n_prompt + n_out - 1))


def test_the_lowest_free_rows_are_taken_first() -> None:
    queue = Scheduler(3, 100)
    for name in "abcd":
        queue.add(sequence(name, 2))
    queue.step()
    assert [s.rows for s in queue.running.values()] == [(0,), (1,), (2,)]
    queue.remove("c")
    queue.remove("a")
    queue.step()
    assert queue.running["d"].rows == (0,)
    assert queue.remove("nobody") is None


def test_who_may_not_start_holds_back_those_behind() -> None:
    queue = Scheduler(3, 100)
    for name in "ab":
        queue.add(sequence(name, 2))
    assert queue.step(lambda s: s.request.id == "b") is None
    assert len(queue.waiting) == 2
    assert queue.remove("b") is not None
    batch = queue.step()
    assert batch is not None
    assert [s.sequence.request.id for s in batch.segments] == ["a"]


def test_decoding_goes_on_while_a_long_prompt_is_read() -> None:
    queue = Scheduler(2, 5)
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


def test_a_batch_splits_into_its_requests() -> None:
    a, b = sequence("a", 3, 2), sequence("b", 1)
    a.rows, b.rows = (0, 2), (1,)
    batch = Batch.pack([(a, 0, 3), (b, 0, 1)])
    assert [(s.row, s.offset, s.is_shadow) for s in batch.segments] == [(1, 0, False), (0, 1, False), (2, 4, True)]
    assert (batch.n_tokens, batch.n_prompt_tokens) == (7, 4)
    parts = list(batch.split())
    assert [[s.row for s in part.segments] for part in parts] == [[1], [0, 2]]


def test_scheduler_and_scope_name_no_torch() -> None:
    for module in (scheduler, scope):
        assert "import torch" not in Path(module.__file__ or "").read_text()


def test_a_request_that_only_reads_never_samples_and_is_judged_once_at_each_position() -> None:
    queue = Scheduler(2, 4)
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
    queue = Scheduler(2, 8)
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
