"""Giving way: work on a thread of low priority, in small pieces, with rests while requests run.

Between two pieces of work the thread rests, for as long as makes its part of the processor `SHARE` while anyone
generates; when nobody does it works on. What is counted is processor time: a thread that waits has nothing to make up
for. Priority alone would not do: the pieces hold the interpreter's lock and the caches whoever waits for them.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

NICE = 10
"""Added to the thread's niceness: a tenth of a competing thread's time. More, and whoever waits for the interpreter's
lock would wait for a thread that is not scheduled."""
SHARE = 0.25
"""Part of the time that a job works while requests run."""
PIECE_SECONDS = 0.002
"""Work after which it is worth while to rest: a rest has a cost of its own."""
LONGEST_REST_SECONDS = 2.0


class Cancelled(Exception):
    """The job was cancelled. Raised inside it, at its next pause."""


class Pace:
    """Called between the pieces of a job: rests while others run, and ends the job once `stop` is set."""

    def __init__(self, is_busy: Callable[[], bool], stop: threading.Event) -> None:
        self._is_busy = is_busy
        self._stop = stop
        self._since = time.thread_time()

    def __call__(self) -> None:
        """Rest if it is time. Raises Cancelled, also when cancelled during the rest."""
        worked = time.thread_time() - self._since
        if worked >= PIECE_SECONDS:
            if self._is_busy():
                self._stop.wait(min(worked * (1 / SHARE - 1), LONGEST_REST_SECONDS))
            self._since = time.thread_time()
        if self._stop.is_set():
            raise Cancelled


def step_back() -> None:
    """Give this thread a low priority, where the system has priorities of threads, and one thread of torch's pool."""
    if sys.platform == "linux":  # elsewhere a thread's id is no process id, and the call would hit a stranger
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
    threads = torch.get_num_threads()  # also makes this thread's own setting, which is then no longer the default
    torch.set_num_threads(1)
    # The call sets this thread's number and the default of threads that are yet to come; the second is put back.
    restoring = threading.Thread(target=torch.set_num_threads, args=(threads,))
    restoring.start()
    restoring.join()


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """On a GPU, a stream of the least priority, so that nothing waits in line behind a job's kernels."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream(device, priority=0)):
        yield
