"""Jobs: long work in the background, one at a time, independent of the connection that asked for it.

    queued → running → succeeded | failed | cancelled            queued → cancelled

One worker thread takes them in order. A job is watched by any number of clients; each sees the present state first,
then every change. The last `KEPT` that ended are remembered.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

import torch

from server.account import Json
from server.background import Cancelled, step_back
from server.schema.errors import ApiError, from_steering
from steering import SteeringError

Kind = Literal["fit", "sweep"]
State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
STATES: tuple[State, ...] = ("queued", "running", "succeeded", "failed", "cancelled")
WAITING = 16
"""Jobs that may wait; more are refused with a 429."""
KEPT = 256
"""Jobs that are remembered after their end."""
STEP = 0.01
"""Least progress that is told: a hundred events a job, not a hundred thousand."""
RETRY_SECONDS = 10
CLOSE_SECONDS = 5.0
"""How long a closing server waits for the running job to notice."""
log = logging.getLogger("setpoint.job")


@dataclass(frozen=True)
class Done:
    """What a job leaves: the name of an artifact, figures, or both."""

    artifact: str | None = None
    result: Json | None = None


@dataclass(frozen=True)
class Task:
    """Work to be done. `work` gets the running job, whose `report` and `stop` it uses; `name` is the concept's.

    Two tasks that write the same artifact do not wait or run at the same time, and what one reads is not deleted.
    """

    kind: Kind
    name: str
    work: Callable[[Job], Done]
    writes: str | None = None
    reads: str | None = None


@dataclass(eq=False)
class Job:
    """One task and how far it is. Changed by `Jobs` alone, but for `report`, which the work calls."""

    task: Task
    _publish: Callable[[Job], None]
    id: str = field(default_factory=lambda: f"job-{uuid.uuid4().hex}")
    state: State = "queued"
    stage: str = "queued"
    progress: float = 0.0
    done: Done = field(default_factory=Done)
    error: Json | None = None
    created: float = field(default_factory=time.time)
    started: float | None = None
    finished: float | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    """Set when the job is to end."""
    watchers: list[Callable[[Json], None]] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        """Whether the state is final."""
        return self.finished is not None

    def report(self, stage: str, progress: float) -> None:
        """Tell the stage and the fraction done, 0 to 1. Raises Cancelled once the job is to end."""
        if self.stop.is_set():
            raise Cancelled
        if stage != self.stage or progress >= self.progress + STEP:
            self.stage, self.progress = stage, max(self.progress, min(progress, 1.0))
            self._publish(self)

    def to_json(self) -> Json:
        """As clients see it. Times are seconds since 1970."""
        return {
            "id": self.id,
            "object": "steering.job",
            "kind": self.task.kind,
            "name": self.task.name,
            "state": self.state,
            "progress": round(self.progress, 4),
            "stage": self.stage,
            "error": self.error,
            "artifact": self.done.artifact,
            "result": self.done.result,
            "created": _seconds(self.created),
            "started": _seconds(self.started),
            "finished": _seconds(self.finished),
        }


class Jobs:
    """The queue, the worker and the memory of jobs. Safe from any thread."""

    def __init__(self) -> None:
        self.on_finished: list[Callable[[Kind, State, float], None]] = []
        """Called at each job's end with its kind, its final state and the seconds it ran."""
        self._jobs: dict[str, Job] = {}
        self._watchers: list[Callable[[Json], None]] = []
        self._queue: deque[Job] = deque()
        self._ended: Counter[State] = Counter()
        self._change = threading.Condition(threading.RLock())
        self._worker: threading.Thread | None = None
        self._is_closed = False

    def submit(self, task: Task) -> Job:
        """Queue a task. Raises ApiError: 429 when too many wait, 409 when one of them writes the same artifact, 503
        when the server is shutting down."""
        with self._change:
            if self._is_closed:
                raise ApiError(503, "The server is shutting down.", code="draining", headers={"Retry-After": "1"})
            open_ = [job for job in self._jobs.values() if not job.is_over]
            if task.writes is not None and any(job.task.writes == task.writes for job in open_):
                raise ApiError(
                    409,
                    f"name: another job is making {task.writes!r}; wait for it, cancel it, or choose another name.",
                    param="name",
                    code="name_in_use",
                )
            if len(self._queue) >= WAITING:
                raise ApiError(
                    429,
                    f"{WAITING} jobs wait already: try again later.",
                    code="jobs_full",
                    headers={"Retry-After": str(RETRY_SECONDS)},
                )
            job = Job(task, self._publish)
            self._jobs[job.id] = job
            self._queue.append(job)
            self._publish(job)
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="setpoint-jobs", daemon=True)
                self._worker.start()
            self._change.notify_all()
        return job

    def get(self, id_: str) -> Job:
        """One job. Raises ApiError 404."""
        with self._change:
            found = self._jobs.get(id_)
        if found is None:
            raise ApiError(404, "There is no such job; /v1/steering/jobs lists those there are.", code="job_not_found")
        return found

    def all(self) -> list[Job]:
        """Every job that is remembered, oldest first."""
        with self._change:
            return list(self._jobs.values())

    def reads(self, artifact: str) -> bool:
        """Whether a job that waits or runs needs an artifact."""
        return any(job.task.reads == artifact for job in self.all() if not job.is_over)

    def counts(self) -> dict[str, int]:
        """Jobs that wait and run now, and those that ended each way since the start."""
        with self._change:
            now = Counter(job.state for job in self._jobs.values() if not job.is_over)
            return {state: now[state] + self._ended[state] for state in STATES}

    def cancel(self, id_: str) -> Job:
        """End a job: at once if it waits, else at its next pause. Raises ApiError 404, and 409 when it is over."""
        with self._change:
            job = self.get(id_)
            if job.is_over:
                raise ApiError(409, f"This job has {job.state} already.", code="job_over")
            job.stop.set()
            if job.state == "queued":
                self._queue.remove(job)
                self._end(job, "cancelled")
            else:
                job.stage = "cancelling"
                self._publish(job)
            self._change.notify_all()
        return job

    def cancel_all(self) -> None:
        """End every job, and take no more."""
        with self._change:
            self._is_closed = True
            for job in self.all():
                if not job.is_over:
                    self.cancel(job.id)
            self._change.notify_all()

    def close(self) -> None:
        """End every job and the worker. Waits for a piece of work that is under way, but not for ever."""
        self.cancel_all()
        worker = self._worker
        if worker is not None:
            worker.join(CLOSE_SECONDS)

    async def watch(self, id_: str) -> AsyncIterator[Json]:
        """The present state of a job and every change, up to the final one. Raises ApiError 404."""
        loop, changes = asyncio.get_running_loop(), asyncio.Queue[Json]()

        def tell(document: Json) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody watches any more
                loop.call_soon_threadsafe(changes.put_nowait, document)

        with self._change:
            job = self.get(id_)
            job.watchers.append(tell)
            tell(job.to_json())
        try:
            while True:
                document = await changes.get()
                yield document
                if document["finished"] is not None:
                    return
        finally:
            with self._change:
                job.watchers.remove(tell)

    async def watch_all(self) -> AsyncIterator[Json]:
        """Every job as it is now, then every change of any."""
        loop, changes = asyncio.get_running_loop(), asyncio.Queue[Json]()

        def tell(document: Json) -> None:
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(changes.put_nowait, document)

        with self._change:
            for job in self.all():
                tell(job.to_json())
            self._watchers.append(tell)
        try:
            while True:
                yield await changes.get()
        finally:
            with self._change:
                self._watchers.remove(tell)

    # ── on the worker's thread ───────────────────────────────────────────────────────────────────────────────────────

    def _work(self) -> None:
        step_back()
        while True:
            with self._change:
                self._change.wait_for(lambda: self._queue or self._is_closed)
                if not self._queue:
                    return
                job = self._queue.popleft()
                job.state, job.started, job.stage = "running", time.time(), "starting"
                self._publish(job)
            self._run(job)

    def _run(self, job: Job) -> None:
        """One job to its end. Whatever it raises is told, and ends it alone."""
        try:
            job.done = job.task.work(job)
        except Cancelled:
            self._end(job, "cancelled")
        except Exception as error:
            if not isinstance(error, SteeringError):
                log.error("a job failed", exc_info=error, extra={"fields": {"job": job.id}})
            job.error = _told(error)
            self._end(job, "failed")
        else:
            job.stage, job.progress = "done", 1.0
            self._end(job, "succeeded")

    def _publish(self, job: Job) -> None:
        with self._change:
            document = job.to_json()
            for watcher in (*job.watchers, *self._watchers):
                watcher(document)

    def _end(self, job: Job, state: State) -> None:
        """Enter a final state, tell it, and forget the oldest of those that ended."""
        with self._change:
            job.state, job.finished = state, time.time()
            if state == "cancelled":
                job.stage = state
            self._ended[state] += 1
            over = [one.id for one in self._jobs.values() if one.is_over]
            for id_ in over[: max(0, len(over) - KEPT)]:
                del self._jobs[id_]
            self._publish(job)
            # What the work held, a fit its examples, is not kept with what is remembered.
            job.task = Task(job.task.kind, job.task.name, elsewhere)
        seconds = 0.0 if job.started is None else job.finished - job.started
        fields = {"job": job.id, "kind": job.task.kind, "name": job.task.name, "state": state}
        code = {} if job.error is None else {"error": job.error["code"]}
        log.info("job", extra={"fields": {**fields, "seconds": round(seconds, 3), **code}})
        for told in self.on_finished:
            told(job.task.kind, state, seconds)


def elsewhere(_: Job) -> Done:
    """The work of a job that is over, or runs in another process."""
    raise AssertionError("a job runs once")


def _told(error: Exception) -> Json:
    """An error in OpenAI's form, without traces or paths."""
    if isinstance(error, ApiError):
        told = error
    elif isinstance(error, SteeringError):
        told = from_steering(error)
    elif isinstance(error, MemoryError | torch.OutOfMemoryError):
        told = ApiError(500, "The job ran out of memory: give shorter or fewer examples.", code="out_of_memory")
    else:
        told = ApiError(500, f"The job failed ({type(error).__name__}); the log says why.", code="internal_error")
    found: Json = told.body()["error"]
    return found


def _seconds(time_: float | None) -> float | None:
    return None if time_ is None else round(time_, 3)
