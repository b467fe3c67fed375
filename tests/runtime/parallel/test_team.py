"""The processes that share a model: what they tell each other, and what becomes of a model that has lost one."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from steering.demo import MODEL
from steering.errors import PlantError, SteeringError, TeamLost
from steering.plant.plant import Plant
from steering.plant.shared import require_shareable
from steering.plant.team import Crew, Group, Message, receive, send
from steering.program import Program
from steering.runtime import Engine, EngineSettings, Event, Finished, Request, Sampling
from steering.runtime.follower import Follower, listen, main
from steering.runtime.parallel import packed_frame, unpacked_frame
from steering.runtime.scheduler import Batch, Sequence
from steering.runtime.scope import Steering, resolve
from tests.plants import tiny, tiny_tokenizer
from tests.runtime.naive import across_program
from tests.runtime.parallel.conftest import needs_accelerate
from tests.runtime.test_conditions import behind, gate

CPU = torch.device("cpu")
STUB = "tests.runtime.parallel.stub"


def gone(pid: int) -> bool:
    """Whether no process of this id runs: a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until(condition: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_message_arrives_as_it_was_sent() -> None:
    here, there = socket.socketpair()
    arrays = [np.arange(6, dtype=np.int32).reshape(2, 3), np.zeros((0, 4), np.float32), np.array([[True], [False]])]
    big = Message("step", {"a": [1, 2.5, None, float("inf")]}, [*arrays, np.ones(2**20, np.float32)])
    sender = threading.Thread(target=send, args=(here, big))
    sender.start()
    got = receive(there)
    sender.join()
    assert got is not None
    assert got[:2] == big[:2]
    for one, other in zip(got.arrays, big.arrays, strict=True):
        assert one.dtype == other.dtype
        assert np.array_equal(one, other)
        assert one.flags.writeable
    here.close()
    assert receive(there) is None


def test_half_a_message_is_none() -> None:
    here, there = socket.socketpair()
    here.sendall((100).to_bytes(8, "little") + b"half")
    here.close()
    assert receive(there) is None


def test_a_frame_does_the_same_behind_the_wire() -> None:
    from steering.runtime.bank import Knobs

    programs = [behind(gate(1, 0.1), across_program(1)), behind(gate(2, on="prompt"), across_program(2)), Program()]
    sequences = [Sequence(Request(str(i), (3, 4, 5, 6), Sampling(), one)) for i, one in enumerate(programs)]
    steerings = {
        s.request.id: Steering.of(s.request.program, i + 1, Knobs.of(s.request.program), 4)
        for i, s in enumerate(sequences[:2])
    }
    frame = resolve(Batch.pack([(s, 0, 4) for s in sequences], 16), steerings, 2)
    assert frame is not None
    here, there = socket.socketpair()
    fields, arrays = packed_frame(frame)
    send(here, Message("step", fields, arrays))
    got = receive(there)
    assert got is not None
    made = unpacked_frame(got.fields, got.arrays)
    assert (made.routes, made.blanks) == (frame.routes, frame.blanks)
    for name in ("slot_PT", "knobs_TP3R", "budget_T"):
        assert np.array_equal(getattr(made, name), getattr(frame, name))
    for one, other in zip(made.spots, frame.spots, strict=True):
        assert np.array_equal(one.tokens_K, other.tokens_K)
        assert np.array_equal(one.channels_R, other.channels_R)
        assert torch.equal(one.gate.probe, other.gate.probe)
        assert (one.gate.low, one.gate.high, one.gate.when) == (other.gate.low, other.gate.high, other.gate.when)


@pytest.mark.parametrize("width", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_shares_cover_a_width_once(width: int, size: int) -> None:
    covered = [i for rank in range(size) for i in range(width)[Group(rank, size, CPU).share(width)]]
    assert covered == list(range(width))
    cut = torch.arange(width).chunk(size)  # as weights are cut
    for rank, part in enumerate(cut):
        assert range(width)[Group(rank, size, CPU).share(width)] == range(int(part[0]), int(part[-1]) + 1)


def test_parts_of_unequal_widths_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.arange(2 * 5.0).reshape(2, 5)
    groups = [Group(rank, 3, CPU) for rank in range(3)]

    def gather(parts: list[Tensor], own: Tensor) -> None:
        for part, group in zip(parts, groups, strict=True):
            piece = group.own(whole)
            part.copy_(torch.nn.functional.pad(piece, (0, 2 - piece.shape[-1])))

    monkeypatch.setattr("steering.plant.team.dist.all_gather", gather)
    for group in groups:
        assert torch.equal(group.whole(group.own(whole), 5), whole)
    assert groups[0].whole(whole, 5) is whole


@needs_accelerate
@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"tensor_parallel": 0}, "an integer >= 1"),
        ({"tensor_parallel": 5}, "a divisor of"),
        ({"tensor_parallel": 2, "dtype": "float8"}, "dtype"),
        ({"tensor_parallel": 2, "device": "abacus"}, "abacus"),
    ],
)
def test_what_cannot_be_shared_is_refused_before_anything_starts(
    given: dict[str, Any], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steering.plant.shared.Crew", lambda *_: pytest.fail("processes were started"))
    with pytest.raises(PlantError, match=part):
        Plant.load(MODEL, **given)


@needs_accelerate
def test_a_gpu_that_is_not_the_first_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process takes the GPU of its rank, whichever was named."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    with pytest.raises(PlantError, match="CUDA_VISIBLE_DEVICES"):
        require_shareable(AutoConfig.from_pretrained(MODEL), 2, torch.device("cuda", 1))
    require_shareable(AutoConfig.from_pretrained(MODEL), 2, torch.device("cuda", 0))


@needs_accelerate
def test_a_quantised_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steering.plant.plant.chosen", lambda *_: ("int8", None))
    with pytest.raises(PlantError, match="cannot share a quantised model"):
        Plant.load(MODEL, tensor_parallel=2)


@needs_accelerate
def test_a_family_without_a_plan_is_refused(tmp_path: Path) -> None:
    tiny("gpt2").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(PlantError, match="has no plan"):
        Plant.load(tmp_path, tensor_parallel=2)


@needs_accelerate
def test_a_follower_that_cannot_start_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steering.plant.team.FOLLOWER", "steering.no_such_module")
    with pytest.raises(TeamLost, match="rank 1, ended with code 1"):
        Plant.load(MODEL, tensor_parallel=2)


@needs_accelerate
def test_the_embedded_model_shared_and_then_left_by_a_follower() -> None:
    """Loaded as anybody would: equal answers; then a follower is killed in the middle of requests."""
    sizes = EngineSettings(max_batch=4, max_model_len=128, kv_tokens=1024)
    alone = Plant.load(MODEL)
    prompt = tuple(alone.encode("Today the weather"))
    asked = [Request(str(i), prompt, Sampling(max_tokens=12, temperature=0), one) for i, one in enumerate([Program()])]
    want = Engine(alone, sizes).generate(asked)
    shared = Plant.load(MODEL, tensor_parallel=2)
    crew = shared.crew
    assert crew is not None
    (pid,) = crew.pids
    try:
        for number in (signal.SIGTERM, signal.SIGINT):  # the follower is deaf to them: rank 0 drains, and then says so
            os.kill(pid, number)
        assert shared.fingerprint == alone.fingerprint
        with pytest.raises(PlantError, match="in a group"):
            Plant.load(MODEL, tensor_parallel=2)
        engine = Engine(shared, sizes)
        engine.start()
        assert [one.tokens for one in engine.generate(asked)] == [one.tokens for one in want]
        reasons: list[SteeringError] = []
        crew.on_loss(reasons.append)
        ended: list[Finished] = []
        begun = threading.Event()

        def deliver(event: Event) -> None:
            begun.set()
            if isinstance(event, Finished):
                ended.append(event)

        for i in range(3):
            engine.submit(Request(f"long{i}", prompt, Sampling(max_tokens=100, ignore_eos=True)), deliver)
        assert begun.wait(20)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: len(ended) == 3)
        for one in ended:
            assert one.reason == "error"
            assert one.error is not None
            assert one.error.code == "model_lost"
            assert f"process {pid}, rank 1, ended with code -9" in one.error.message
        wait_until(lambda: reasons)
        assert reasons == [crew.lost]
        late: list[SteeringError] = []
        crew.on_loss(late.append)
        assert late == reasons
        (after,) = engine.generate([Request("after", prompt)])
        assert str(after.error) == str(crew.lost)
        engine.stop()
    finally:
        shared.close()
    assert gone(pid)
    assert not Path(crew.folder).exists()


def test_a_failure_of_the_leader_alone_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steering.plant.team.FOLLOWER", STUB)
    monkeypatch.setattr("steering.plant.team.GRACE_SECONDS", 0.2)
    crew = Crew(3, CPU)

    def fail() -> None:
        with crew.together("drop", {"name": 1}):
            raise MemoryError

    with pytest.raises(TeamLost, match="rank 0 failed where the others did not: MemoryError"):
        fail()
    wait_until(lambda: all(map(gone, crew.pids)))
    crew.close()
    assert not Path(crew.folder).exists()


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Crew]:
    """Rank 0 of two, whose follower fails when it is told to."""
    monkeypatch.setattr("steering.plant.team.FOLLOWER", STUB)
    monkeypatch.setattr("steering.plant.team.GRACE_SECONDS", 0.5)
    crew = Crew(2, CPU)
    yield crew
    crew.close()


def fail(crew: Crew, error: BaseException | None, number: int, passed: int) -> None:
    """A block that rank 0 fails in with an error, or none, and rank 1 behind so many collectives."""
    with crew.together("fail", {"number": number, "passed": passed, "error": "theirs"}):
        if error is not None:
            raise error


def test_a_failure_of_all_at_the_same_place_leaves_them_together(stubs: Crew) -> None:
    for n in range(3):
        with pytest.raises(MemoryError):
            fail(stubs, MemoryError(), n, 0)
    assert stubs.lost is None


def test_a_failure_of_all_at_different_places_does_not(stubs: Crew) -> None:
    """Who is a collective behind would take the answer to the next one for its own."""
    with pytest.raises(TeamLost, match="rank 0 failed where the others did not: MemoryError"):
        fail(stubs, MemoryError(), 0, 1)


def test_a_failure_that_rank_0_cannot_share_any_more_is_a_loss_at_once(
    stubs: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steering.plant.team.GRACE_SECONDS", 60.0)
    fail(stubs, None, 0, 0)
    wait_until(lambda: stubs.lost is not None)
    assert "rank 1 failed where the others did not: theirs" in str(stubs.lost)


def test_an_interrupt_of_the_leader_ends_the_others(stubs: Crew) -> None:
    """They are in the middle of what it left, and would answer its next question with that."""
    with pytest.raises(KeyboardInterrupt):
        fail(stubs, KeyboardInterrupt(), 5, 0)
    with pytest.raises(TeamLost, match="interrupted by KeyboardInterrupt"):
        stubs.tell("step", {})


def test_half_a_message_is_a_loss(stubs: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("steering.plant.team.send", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stubs.tell("step", {})
    assert stubs.lost is not None


def test_who_was_told_to_end_is_told_nothing_more(stubs: Crew) -> None:
    stubs.close()
    with pytest.raises(TeamLost, match="as they were told to"):
        fail(stubs, None, 0, 0)


@pytest.mark.parametrize(("kind", "ran"), [("fill", ["fill"]), ("step", ["step", "step"])])
def test_a_follower_whose_bank_differs_takes_no_further_step(
    kind: str, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that one process could not take would steer there as what the slot held before. A step that failed is
    another matter: rank 0 may have failed in it too."""
    here, there = socket.socketpair()
    for each in (kind, "step", "end"):
        send(here, Message(each, {"engine": 7}))
    done: list[str] = []
    run = Follower.run

    def noted(follower: Follower, message: Message) -> None:
        done.append(message.kind)
        run(follower, message)

    monkeypatch.setattr(Follower, "run", noted)
    monkeypatch.setattr("steering.runtime.follower.signal.signal", lambda *_: None)
    monkeypatch.setattr("steering.runtime.follower._be_quiet", lambda: None)
    main([str(there.detach()), "1", "2", "folder", "cpu"])
    assert done == ran
    told = receive(here), receive(here)
    assert told[0] == Message("here", {}, [])
    assert told[1] == Message("failed", {"number": 0, "passed": 0, "error": "KeyError: 7"}, [])


def test_a_follower_ends_when_its_leader_is_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In whatever it waits for: the thread that listens ends the process."""
    codes: list[int] = []
    monkeypatch.setattr("steering.runtime.follower.os._exit", codes.append)
    (tmp_path / "met").mkdir()
    here, there = socket.socketpair()
    send(here, Message("drop", {"name": 1}))
    here.close()
    told: queue.SimpleQueue[Message] = queue.SimpleQueue()
    listen(there, told, str(tmp_path / "met"))
    assert (told.get().kind, codes) == ("drop", [1])
    assert not (tmp_path / "met").exists()


def test_followers_end_when_the_process_that_started_them_is_killed(tmp_path: Path) -> None:
    code = (
        "import steering.plant.team as team, torch, time\n"
        f"team.FOLLOWER = {STUB!r}\n"
        "print(*team.Crew(2, torch.device('cpu')).pids, flush=True)\ntime.sleep(60)"
    )
    here = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=here) as leader:
        assert leader.stdout is not None
        pid = int(leader.stdout.readline())
        assert not gone(pid)
        leader.kill()
    wait_until(lambda: gone(pid))


def test_a_loss_while_nobody_asks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steering.plant.team.FOLLOWER", STUB)
    crew = Crew(3, CPU)
    told: list[SteeringError] = []
    crew.on_loss(told.append)
    os.kill(crew.pids[1], signal.SIGKILL)
    wait_until(lambda: told)
    assert "rank 2, ended with code -9" in str(told[0])
    wait_until(lambda: gone(crew.pids[0]))
    crew.close()
