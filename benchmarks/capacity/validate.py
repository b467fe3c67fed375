"""The simulated replica beside the measured one, on the very arrivals that were measured.

`benchmarks.load` draws its arrivals from a seed, so the same requests come at the same times here. The law of a step
has four unknowns on the embedded model: a fixed time, a time per request, one per token of a prompt, and what HTTP,
the tokenizer and the compilation of a program take before a request is queued. They are fitted to the medians of the
rates `FITTED`; all else is predicted: the other rates, all 99th percentiles, and the ten minutes at one rate.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.capacity.replica import Job, served
from benchmarks.capacity.service import Steps
from benchmarks.load import arrivals, percentile

RESULTS = Path(__file__).parents[1] / "results"
FITTED = (1.0, 4.0, 16.0)
NAMES = ("ttft", "itl", "e2e")
SHARES = (0.5, 0.99)
PROMPT_TOKENS = (4.7, 1.14)
"""Tokens of a prompt: of the chat template, and for each word. Over all rates as the embedded tokenizer counts them."""


def jobs_of(planned: Sequence[Any]) -> list[Job]:
    """What the planned arrivals of `benchmarks.load` are to a replica."""
    base, per_word = PROMPT_TOKENS
    return [
        Job(
            one.at,
            round(base + per_word * len(one.body["messages"][0]["content"].split())),
            one.body["max_tokens"],
        )
        for one in planned
    ]


def measured_side(body: Mapping[str, Any]) -> dict[str, float]:
    """The figures that are compared, of a load result."""
    return {f"{n}_p{100 * s:.0f}_ms": body[f"{n}_p{100 * s:.0f}_ms"] for n in NAMES for s in SHARES}


def predicted(steps: Steps, places: int, jobs: Sequence[Job], ahead: float) -> dict[str, float]:
    """The figures that `benchmarks.load` gives, of a simulated replica."""
    done = served(steps, places, [Job(job.at, job.prompt, job.answer) for job in jobs], ahead)
    measured = {
        "ttft": [job.times[0] - job.at for job in done],
        "itl": [b - a for job in done for a, b in zip(job.times, job.times[1:], strict=False)],
        "e2e": [job.times[-1] - job.at for job in done],
    }
    found = {f"{n}_p{100 * s:.0f}_ms": 1e3 * percentile(measured[n], s) for n in NAMES for s in SHARES}
    return {name: round(float(value), 2) for name, value in found.items()}


def arrivals_of(body: Mapping[str, Any]) -> list[list[Job]]:
    """The arrivals of every row of a load result, drawn as `benchmarks.load` drew them: seed 0, after its warm-up.

    Raises ValueError when they are not as many as the result says, so that another benchmark is not taken for this one.
    """
    rng, found = random.Random(0), []
    if "rows" not in body:
        found.append(jobs_of(arrivals(body["rate"], 600.0, body["steered_share"], rng)))
    else:
        arrivals(4.0, 2.0, 0.5, rng)
        share = body["steered_share"]
        found.extend(jobs_of(arrivals(row["rate"], 30.0, share, rng)) for row in body["rows"])
    counts = [row["requests"] for row in body.get("rows", [body])]
    if counts != [len(jobs) for jobs in found]:
        raise ValueError(f"the arrivals are not those that were measured: {counts} against {[len(j) for j in found]}")
    return found


def fitted(body: Mapping[str, Any], jobs: Sequence[Sequence[Job]]) -> tuple[Steps, float]:
    """The law of a step and the seconds before the queue that meet the medians of the rates `FITTED` best.

    Least squares of the logarithms, by Nelder and Mead's simplex from a fixed start.
    """
    from scipy.optimize import minimize

    chosen = [(row["all"], one) for row, one in zip(body["rows"], jobs, strict=True) if row["rate"] in FITTED]

    def law(unknowns: np.ndarray) -> tuple[Steps, float]:
        fixed, sequence, token, ahead = (float(value) for value in np.exp(unknowns))
        return Steps(fixed, sequence, 0.0, token), ahead

    def error(unknowns: np.ndarray) -> float:
        steps, ahead = law(unknowns)
        total = 0.0
        for measured, one in chosen:
            found = predicted(steps, body["max_batch"], one, ahead)
            total += sum(math.log(found[f"{n}_p50_ms"] / measured[f"{n}_p50_ms"]) ** 2 for n in NAMES)
        return total

    start = np.log([0.006, 0.0008, 0.0003, 0.008])
    best = minimize(error, start, method="Nelder-Mead", options={"maxfev": 120, "xatol": 0.01, "fatol": 1e-4})
    return law(best.x)


def validated() -> dict[str, Any]:
    """The fit and every measured figure beside the simulated one."""
    body, long = (json.loads((RESULTS / f"load-{n}cpu.json").read_text(encoding="utf-8")) for n in ("", "endurance-"))
    jobs = arrivals_of(body)
    steps, ahead = fitted(body, jobs)
    rows = []
    for measured, one in [*zip(body["rows"], jobs, strict=True), (long, arrivals_of(long)[0])]:
        rows.append(
            {
                "rate": measured["rate"],
                "seconds": measured["seconds"],
                "is_fitted": "verdict" not in measured and measured["rate"] in FITTED,
                "measured": measured_side(measured["all"]),
                "simulated": predicted(steps, body["max_batch"], one, ahead),
            }
        )
    return {"kind": "validation", "steps": asdict(steps), "ahead": ahead, "places": body["max_batch"], "rows": rows}
