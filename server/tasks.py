"""From the bodies of jobs to their work. All that can be wrong with a body is found here, before the job is queued."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from server.account import Json
from server.background import Pace, own_stream
from server.host import Host
from server.jobs import Done, Job, Task
from server.schema.jobs import FitRequest, SweepRequest, plain
from steering import Artifact, FitSettings, Scope, SpecError, SteeringError, fit_concept
from steering.artifact import checked_name
from steering.demo.contrast import prompts as held_out
from steering.demo.judges import JUDGES, Judge
from steering.errors import StoreUnwritable
from steering.evaluation import Sweep, run_sweep
from steering.fit import Example, warning
from steering.fit.plans import checked_rows, fit_plan, plan_warning, settings_of

SWEEP_PROMPTS = 32
"""Held-out prompts of a sweep that names none."""
SAVING = 600.0
"""Seconds for which a fit that is done waits for a store that does not take it."""
SAVE_AGAIN = 5.0
"""Seconds between two attempts."""


def fit_task(body: FitRequest, host: Host) -> Task:
    """The fit of one concept or plan. Raises SteeringError that names the field or the row."""
    host.plant.require_whole()
    host.store.require_own(checked_name(body.name))
    settings = _settings(body, host)
    given = [plain(row) for row in body.positive], [plain(row) for row in body.negative]
    classes = checked_rows(host.plant, body.kind, settings, *given)
    return Task("fit", body.name, partial(_fit, host, body.name, classes, settings), writes=body.name)


def _settings(body: FitRequest, host: Host) -> Any:
    """The settings of a fit for the served model. Raises SteeringError that names `method.…`."""
    given: dict[str, Any] = body.method.model_dump(exclude_none=True)
    if body.kind == "concept":
        given.pop("direction", None)
    if isinstance(given.get("gains"), str):
        given["gains"] = (given["gains"],)
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    try:
        return settings_of(body.kind, given, host.plant)
    except SteeringError as error:
        raise error.at("method") from error


def _fit(host: Host, name: str, examples: tuple[list[Example], list[Example]], settings: Any, job: Job) -> Done:
    """Fit and save. Nothing is written before the fit is complete."""
    with own_stream(host.plant.device):
        pace = _pace(host, job)
        if isinstance(settings, FitSettings):
            concept = fit_concept(host.plant, name, *examples, settings, partial(_report, job), pace)
            artifact, quality, doubt = concept.artifact(), concept.quality, warning(concept.quality)
        else:
            plan = fit_plan(host.plant, name, *examples, settings, partial(_report, job), pace)
            artifact, quality, doubt = plan.artifact(), plan.quality, plan_warning(plan.quality)
    result: Json = {"fingerprint": artifact.fingerprint, "quality": dict(quality), "warning": doubt}
    _keep(host, artifact, job)
    return Done(name, result)


def _report(job: Job, stage: str, progress: float) -> None:
    """Tell how far a fit is. That it is done is not said of the job, which has yet to save."""
    if stage != "done":
        job.report(stage, progress)


def _keep(host: Host, artifact: Artifact, job: Job) -> None:
    """Save what was fitted; where the store does not take it try again for `SAVING` seconds, or the work would be lost.
    Raises StoreUnwritable, and Cancelled up to the first moment of each attempt."""
    deadline = time.monotonic() + SAVING
    job.report("saving", 1.0)
    while True:
        try:
            host.store.save(artifact)
            return
        except StoreUnwritable:
            if time.monotonic() > deadline:
                raise
        job.report("waiting for the store", 1.0)
        job.stop.wait(SAVE_AGAIN)
        job.report("waiting for the store", 1.0)


def sweep_task(body: SweepRequest, host: Host) -> Task:
    """A dose–response curve of one concept. Raises SteeringError that names the field."""
    host.plant.require_whole()
    host.shelf.concept(body.concept)
    is_ready = _is_ready(host, body.concept)
    name = body.judge or (body.concept if is_ready else None)
    if name is not None and name not in JUDGES:
        raise SpecError("judge", expected=f"null, or one of {', '.join(JUDGES)}", got=name)
    judge: Judge | None = JUDGES[name] if name else None
    sweep = Sweep(
        concept=body.concept,
        type=body.type,
        grid=tuple(body.grid),
        prompts=_prompts(body, is_ready),
        apply=body.apply or Scope(),
        max_tokens=body.max_tokens,
        temperature=body.temperature,
        seed=body.seed,
        judge=judge,
    )
    sweep.programs(host.shelf)
    sweep.metered(host.shelf)
    sweep.encoded(host.plant, host.context)
    return Task("sweep", body.concept, partial(_sweep, host, sweep, name), reads=body.concept)


def _prompts(body: SweepRequest, is_ready: bool) -> tuple[Example, ...]:
    if body.prompts is not None:
        return tuple(plain(prompt) for prompt in body.prompts)
    if not is_ready:
        raise SpecError("prompts", expected="prompts, since this concept has none of its own")
    return tuple(held_out(body.concept, "neutral", "test", SWEEP_PROMPTS))


def _sweep(host: Host, sweep: Sweep, judge: str | None, job: Job) -> Done:
    with own_stream(host.plant.device):
        found = run_sweep(host.plant, host.shelf, host.engine, sweep, job.report, _pace(host, job))
    return Done(result={**found, "judge": judge})


def _is_ready(host: Host, concept: str) -> bool:
    """Whether `concept` is one that ships with the model that is served: it has a judge and held-out prompts."""
    return any(
        entry.name == concept and entry.builtin and entry.model == host.plant.fingerprint
        for entry in host.store.entries(here=True)
    )


def _pace(host: Host, job: Job) -> Pace:
    """The pauses of a job, made on its own thread."""

    def is_busy() -> bool:
        stats = host.engine.stats()
        return stats.running + stats.waiting > 0

    return Pace(is_busy, job.stop)
