"""The gateway's memory of jobs that run elsewhere."""

from __future__ import annotations

from typing import Any

import pytest

from server.replicas.ledger import Ledger
from server.schema.errors import ApiError


def document(id_: str, state: str = "queued", **fields: Any) -> dict[str, Any]:
    told = {"id": id_, "kind": "fit", "name": "a", "state": state, "stage": state, "progress": 0.0, "error": None}
    times = {
        "created": 1.0,
        "started": None,
        "finished": 5.0 if state in ("succeeded", "failed", "cancelled") else None,
    }
    return {**told, **times, "artifact": None, "result": None, **fields}


def test_it_tells_what_it_was_told() -> None:
    ledger = Ledger()
    ended: list[tuple[str, str]] = []
    ledger.on_finished.append(lambda kind, state, _: ended.append((kind, state)))
    ledger.learn(document("job-1"), "here")
    ledger.learn(document("job-1", "running", progress=0.5, stage="gains", started=2.0), "here")
    told = ledger.get("job-1").to_json()
    assert (told["state"], told["progress"], told["stage"], told["started"]) == ("running", 0.5, "gains", 2.0)
    assert ledger.place_of("job-1") == "here"
    ledger.learn(document("job-1", "succeeded", artifact="a", result={"x": 1}, stage="done", progress=1.0), "here")
    told = ledger.get("job-1").to_json()
    assert (told["state"], told["artifact"], told["result"]) == ("succeeded", "a", {"x": 1})
    assert ended == [("fit", "succeeded")]
    assert ledger.place_of("job-1") is None


def test_news_that_are_late_change_nothing() -> None:
    ledger = Ledger()
    ledger.learn(document("job-1", "cancelled"), "here")
    ledger.learn(document("job-1", "running"), "here")
    assert ledger.get("job-1").state == "cancelled"


def test_only_the_open_jobs_of_a_place_that_ends_have_failed() -> None:
    ledger = Ledger()
    ledger.learn(document("job-1"), "here")
    ledger.learn(document("job-2", "running"), "here")
    ledger.learn(document("job-3", "succeeded"), "here")
    ledger.learn(document("job-4", "running"), "there")
    assert ledger.is_busy("here")
    ledger.lose("here")
    assert [job.state for job in ledger.all()] == ["failed", "failed", "succeeded", "running"]
    assert ledger.get("job-1").error is not None
    assert (ledger.is_busy("here"), ledger.is_busy("there")) == (False, True)
    assert ledger.counts()["failed"] == 2


def test_the_last_words_of_a_place_that_has_ended_leave_no_job_open() -> None:
    ledger = Ledger()
    ledger.lose("here")
    ledger.learn(document("job-1", "running"), "here")
    ledger.learn(document("job-2", "succeeded"), "here")
    assert [job.state for job in ledger.all()] == ["failed", "succeeded"]
    assert not ledger.is_busy("here")


def test_what_is_not_there_or_over_cannot_be_cancelled_here() -> None:
    ledger = Ledger()
    with pytest.raises(ApiError) as absent:
        ledger.cancel("job-1")
    ledger.learn(document("job-1", "failed"), "here")
    with pytest.raises(ApiError) as over:
        ledger.cancel("job-1")
    assert (absent.value.status, over.value.status) == (404, 409)


def test_it_ends_with_jobs_that_are_open_elsewhere() -> None:
    ledger = Ledger()
    ledger.learn(document("job-1"), "here")
    ledger.close()
    assert ledger.get("job-1").state == "queued"
