"""A model shared by several processes of one machine: who they are, how they talk, and what becomes of them.

    rank 0     serves, schedules, draws; all decisions are its own
    the others follow: each runs the same passes over its own part of the weights, and knows nothing else

Numbers of the model go through `torch.distributed` (gloo on CPUs, nccl on GPUs). What is to be run is told over a pair
of sockets that no other process has, as JSON and raw arrays: nothing is unpickled. A follower ends when its socket
closes, however rank 0 ended; when a follower ends before it was told to, the others are ended too, and all that waits
for them fails with `TeamLost`.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from steering.errors import TeamLost

FOLLOWER = "steering.runtime.follower"
"""The module that a follower runs."""
JOIN_SECONDS = 600.0
"""Longest that one process waits for another in a collective: they may load at different speeds."""
GRACE_SECONDS = 5.0
"""How long after one process failed in a pass the others may take to fail in it too, which leaves them in step."""


class Message(NamedTuple):
    """What is told: its kind, plain fields, and arrays."""

    kind: str
    fields: Mapping[str, Any]
    arrays: Sequence[np.ndarray] = ()


def send(to: socket.socket, message: Message) -> None:
    """Send a message: the length of a JSON header, the header, the arrays' bytes."""
    arrays = [np.ascontiguousarray(each) for each in message.arrays]
    shapes = [[each.dtype.str, list(each.shape)] for each in arrays]
    header = json.dumps([message.kind, message.fields, shapes]).encode()
    to.sendall(b"".join([len(header).to_bytes(8, "little"), header, *(each.tobytes() for each in arrays)]))


def receive(source: socket.socket) -> Message | None:
    """The next message; None when the other end has closed."""
    try:
        kind, fields, shapes = json.loads(_exactly(source, int.from_bytes(_exactly(source, 8), "little")))
        arrays = []
        for dtype, shape in shapes:
            n_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            arrays.append(np.frombuffer(_exactly(source, n_bytes), dtype).reshape(shape))
    except (EOFError, OSError):
        return None
    return Message(kind, fields, arrays)


def _exactly(source: socket.socket, n: int) -> bytearray:
    data = bytearray(n)
    view = memoryview(data)
    while view:
        got = source.recv_into(view)
        if not got:
            raise EOFError
        view = view[got:]
    return data


@dataclass(frozen=True, slots=True)
class Group:
    """The processes that share a model, seen from one of them."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls, rank: int, size: int, folder: str | Path, device: torch.device) -> Group:
        """Meet the others in a folder that only this user can open. Returns when all of them are there."""
        # Only loopback has to be listened on; who has a reason for another interface says so.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
        backend, own = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        if own is not None:
            torch.cuda.set_device(own)
        store = dist.FileStore(os.path.join(folder, "meeting"), size)  # type: ignore[attr-defined]
        timeout = timedelta(seconds=JOIN_SECONDS)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout, device_id=own)
        return cls(rank, size, device)

    def least(self, value: int) -> int:
        """The least of what the processes say. All of them must ask."""
        told = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.all_reduce(told, op=dist.ReduceOp.MIN)
        return int(told.item())

    def share(self, width: int) -> slice:
        """This process's part of a dimension: equal parts, the last ones shorter or empty."""
        return self._share(self.rank, width)

    def whole(self, state: Tensor, width: int) -> Tensor:
        """A state of which each process has a share of the last dimension; itself where it has this width already.

        All of them must ask.
        """
        if state.shape[-1] == width:
            return state
        chunk = -(-width // self.size)
        own = state.contiguous()
        if own.shape[-1] < chunk:
            own = torch.nn.functional.pad(own, (0, chunk - own.shape[-1]))
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own)
        shares = [self._share(rank, width) for rank in range(self.size)]
        return torch.cat([part[..., : at.stop - at.start] for part, at in zip(parts, shares, strict=True)], dim=-1)

    def own(self, whole: Tensor) -> Tensor:
        """This process's share of a whole state."""
        return whole[..., self.share(whole.shape[-1])].contiguous()

    def _share(self, rank: int, width: int) -> slice:
        chunk = -(-width // self.size)
        return slice(min(rank * chunk, width), min((rank + 1) * chunk, width))


class Crew:
    """The followers of rank 0: started, told what to run, watched, ended.

    What they run must be run here at the same time, in the block of `together`.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        self.lost: TeamLost | None = None
        """Why the followers are gone, once one of them is that should not be."""
        self._folder = tempfile.mkdtemp(prefix="setpoint-team-")
        self._turn = threading.RLock()
        self._failed = threading.Condition()
        self._current = -1
        self._own_failures: set[int] = set()
        self._their_failures: dict[int, dict[int, int]] = {}
        self._numbers = itertools.count()
        self._names = itertools.count()
        self._dropped: deque[int] = deque()
        self._is_closing = self._is_closed = False
        self._on_loss: list[Callable[[TeamLost], None]] = []
        self._present: set[int] = set()
        self._sockets: list[socket.socket] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._watchers: list[threading.Thread] = []
        atexit.register(self.close)
        try:
            for rank in range(1, size):
                self._start(rank, device)
            self._await()
        except BaseException:
            self.close()
            raise

    @property
    def folder(self) -> str:
        """Where the processes meet."""
        return self._folder

    @property
    def pids(self) -> tuple[int, ...]:
        """The followers' process ids, by rank."""
        return tuple(process.pid for process in self._processes)

    def name(self) -> int:
        """A number that nothing else of this crew has."""
        return next(self._names)

    def drop(self, name: int) -> None:
        """Let the followers forget what has this name, with the next message. From any thread, also while another
        message is being sent."""
        self._dropped.append(name)

    def on_loss(self, call: Callable[[TeamLost], None]) -> None:
        """Call with the reason if a follower is lost; at once if one was. From a thread of the crew's own."""
        with self._failed:
            if self.lost is None:
                self._on_loss.append(call)
                return
        call(self.lost)

    def tell(self, kind: str, fields: Mapping[str, Any], arrays: Sequence[np.ndarray] = ()) -> int:
        """Tell every follower; returns the message's number. Raises TeamLost."""
        return self._tell(Message(kind, fields, arrays))

    @contextmanager
    def together(self, kind: str, fields: Mapping[str, Any], arrays: Sequence[np.ndarray] = ()) -> Iterator[None]:
        """Tell every follower to run what the block runs here. One block at a time.

        An error that every process meets in the same block, after as many collectives, is raised as it is: they are
        still in step. Raises TeamLost for one that they do not share. An interrupt is one that they do not share.
        """
        with self._turn:
            number = self._tell(Message(kind, fields, arrays), is_joint=True)
            try:
                yield
            except Exception as error:
                self._reconcile(number, error)
                raise
            except BaseException as error:
                self._lose(f"rank 0 was interrupted by {type(error).__name__}")
                raise
            finally:
                with self._failed:
                    self._current = -1
                    self._failed.notify_all()

    def close(self) -> None:
        """Tell the followers to end, and wait for that."""
        atexit.unregister(self.close)
        self._is_closing = True
        with self._turn:
            if self.lost is None and not self._is_closed:
                with suppress(TeamLost):
                    self.tell("end", {})
            self._is_closed = True
        for process in self._processes:
            try:
                process.wait(timeout=GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for one in self._sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        for watcher in self._watchers:
            if watcher is not threading.current_thread():
                watcher.join(timeout=GRACE_SECONDS)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, rank: int, device: torch.device) -> None:
        here, there = socket.socketpair()
        given = [str(there.fileno()), str(rank), str(self.size), self._folder, device.type]
        # A session of its own: Ctrl-C in a terminal is for rank 0, which drains first.
        process = subprocess.Popen(
            [sys.executable, "-m", FOLLOWER, *given],
            pass_fds=(there.fileno(),),
            stdin=subprocess.DEVNULL,
            env=os.environ | {"LOCAL_RANK": str(rank), "OMP_NUM_THREADS": str(torch.get_num_threads())},
            start_new_session=True,
        )
        there.close()
        self._sockets.append(here)
        self._processes.append(process)
        watcher = threading.Thread(target=self._watch, args=(rank, here), name=f"setpoint-rank-{rank}", daemon=True)
        self._watchers.append(watcher)
        watcher.start()

    def _await(self) -> None:
        """Wait until every follower is there: who met them only in the folder would wait for one that never comes."""
        with self._failed:
            is_complete = self._failed.wait_for(
                lambda: self.lost is not None or len(self._present) == self.size - 1, timeout=JOIN_SECONDS
            )
        self._require()
        if not is_complete:
            raise TeamLost(f"The processes that were to share the model did not start in {JOIN_SECONDS:.0f} seconds.")

    def _tell(self, message: Message, *, is_joint: bool = False) -> int:
        """Send what is to be forgotten, and then a message. is_joint: rank 0 does the same at the same time."""
        with self._turn:
            while self._dropped:
                self._send(Message("drop", {"name": self._dropped.popleft()}))
            return self._send(message, is_joint=is_joint)

    def _send(self, message: Message, *, is_joint: bool = False) -> int:
        if self._is_closed:
            raise TeamLost("The processes that shared the model have ended, as they were told to: load it again.")
        number = next(self._numbers)
        if is_joint:
            self._current = number  # before anybody can have failed in it
        if self.lost is None:
            try:
                for one in self._sockets:
                    send(one, message)
            except OSError:
                self._lose("a process that shares the model no longer listens")
            except BaseException as error:  # half of a message may have gone out
                self._lose(f"rank 0 was interrupted by {type(error).__name__}")
                raise
        self._require()
        return number

    def _watch(self, rank: int, source: socket.socket) -> None:
        """Take what a follower reports until it ends."""
        while (message := receive(source)) is not None:
            with self._failed:
                if message.kind == "here":
                    self._present.add(rank)
                    self._failed.notify_all()
                    continue
                number = int(message.fields["number"])
                self._their_failures.setdefault(number, {})[rank] = int(message.fields["passed"])
                self._failed.notify_all()
                self._failed.wait_for(
                    lambda n=number: n in self._own_failures or n != self._current,  # type: ignore[misc]
                    timeout=GRACE_SECONDS,
                )
                is_shared = number in self._own_failures
            if not is_shared:
                self._lose(f"rank {rank} failed where the others did not: {message.fields['error']}")
        if not self._is_closing and self.lost is None:
            process = self._processes[rank - 1]
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=GRACE_SECONDS)
            self._lose(f"process {process.pid}, rank {rank}, ended with code {process.returncode}")

    def _reconcile(self, number: int, error: Exception) -> None:
        """Return if every follower failed in this block too. Raises TeamLost."""
        own = passed()
        with self._failed:
            self._own_failures.add(number)
            self._failed.notify_all()
            self._failed.wait_for(
                lambda: self.lost is not None or len(self._their_failures.get(number, ())) == self.size - 1,
                timeout=GRACE_SECONDS,
            )
            theirs = list(self._their_failures.get(number, {}).values())
        if theirs != [own] * (self.size - 1):
            self._lose(f"rank 0 failed where the others did not: {type(error).__name__}: {error}")
        self._require()

    def _require(self) -> None:
        """Raise TeamLost, a fresh one for each request, if the followers are gone."""
        if self.lost is not None:
            raise TeamLost(self.lost.message)

    def _lose(self, reason: str) -> None:
        """End all followers, so that nobody waits for them in a collective."""
        with self._failed:
            if self.lost is not None or self._is_closing:
                return
            self.lost = TeamLost(f"The processes that share the model are no longer together ({reason}): start again.")
            waiting, self._on_loss = self._on_loss, []
            self._failed.notify_all()
        for process in self._processes:
            process.kill()
        if dist.is_initialized() and dist.get_backend() == "nccl":
            with suppress(Exception):  # whatever it says, the followers are gone
                dist.distributed_c10d._abort_process_group()
        for call in waiting:
            call(self.lost)


def passed() -> int:
    """Collectives that this process has begun. Who failed after as many as another has no answer of its to come."""
    if not dist.is_initialized() or dist.group.WORLD is None:
        return 0
    return int(dist.group.WORLD._get_sequence_number_for_group())  # type: ignore[attr-defined]


def leave() -> None:
    """Let go of the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()
