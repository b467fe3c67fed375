"""The gateway's memory of jobs, which run in another process: when that one ends, its jobs have failed.

Fed by the writer's journal, and by its answers, which may be faster.
"""

from __future__ import annotations

from server.account import Json
from server.jobs import Done, Job, Jobs, Task, elsewhere
from server.schema.errors import ApiError


class Ledger(Jobs):
    """Jobs of other processes. `place` is the process, a new one each time that a writer starts."""

    def __init__(self) -> None:
        super().__init__()
        self._places: dict[str, str] = {}
        self._gone: set[str] = set()

    def learn(self, document: Json, place: str) -> None:
        """A job's state, as the process tells it that runs the job. One that is over stays as it is."""
        with self._change:
            id_ = document["id"]
            job = self._jobs.get(id_)
            if job is None:
                job = Job(Task(document["kind"], document["name"], elsewhere), self._publish, id_)
                self._jobs[id_] = job
            if job.is_over:
                return
            self._places[id_] = place
            job.stage, job.progress, job.error = document["stage"], document["progress"], document["error"]
            job.created, job.started = document["created"], document["started"]
            job.done = Done(document["artifact"], document["result"])
            if document["finished"] is not None:
                self._finish(job, document["state"])
                return
            job.state = document["state"]
            self._publish(job)
            if place in self._gone:  # its last words, which came late
                self.lose(place)

    def place_of(self, id_: str) -> str | None:
        """Where a job waits or runs; None for one that is over or unknown."""
        with self._change:
            job = self._jobs.get(id_)
            return None if job is None or job.is_over else self._places.get(id_)

    def is_busy(self, place: str) -> bool:
        """Whether a process has jobs that are not over."""
        return any(self.place_of(job.id) == place for job in self.all())

    def lose(self, place: str) -> None:
        """A process has ended: its jobs have failed."""
        with self._change:
            self._gone.add(place)
            for job in self.all():
                if self.place_of(job.id) == place:
                    told = ApiError(
                        503, "The process that ran this job ended: start the job again.", code="replica_lost"
                    )
                    job.error = told.body()["error"]
                    self._finish(job, "failed")

    def cancel_all(self) -> None:
        """Nothing: the processes that run the jobs end them, and tell."""

    def _finish(self, job: Job, state: str) -> None:
        self._end(job, state)  # type: ignore[arg-type]
        self._places = {id_: place for id_, place in self._places.items() if id_ in self._jobs}
