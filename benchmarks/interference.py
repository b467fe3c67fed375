"""How much a running fit delays those who generate: inter-token latency with and without a job, in one run.

Streams run all the time. Rounds of three spans take turns, so that a busy machine slows all alike: nobody else, a fit
as the server runs it (low priority, small pieces, rests), and the same fit on a plain thread. Figures are ratios of the
median and of the 99th percentile of the gaps between two tokens of one stream to those of the spans without a job.

    python -m benchmarks.interference [--model DIR] [--device cpu|cuda] [--streams 4] [--seconds 5] [--rounds 3]
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from server.background import Cancelled
from server.host import Host, load_plant, open_store, served_name
from server.jobs import Done, Job, Jobs, Task
from server.schema.jobs import FitMethod, FitRequest
from server.tasks import fit_task
from steering import Engine, EngineSettings, FitSettings, Request, Sampling, fit_concept
from steering.demo.contrast import contrast
from steering.runtime.request import Event

RESULTS = Path(__file__).parent / "results"
SPANS = ("alone", "paced", "plain")
EXAMPLES = 400
TOKENS = 200


class Streams:
    """Requests that follow one another without end, and the gaps between their tokens."""

    def __init__(self, engine: Engine, n: int) -> None:
        self.gaps: list[float] = []
        self._engine = engine
        self._ids = itertools.count()
        self._ended = threading.Event()
        for _ in range(n):
            self._next()

    def _next(self) -> None:
        last: float | None = None

        def deliver(event: Event) -> None:
            nonlocal last
            now = time.perf_counter()
            if not hasattr(event, "token"):
                if not self._ended.is_set():
                    self._next()
                return
            if last is not None:
                self.gaps.append(now - last)
            last = now

        number = next(self._ids)
        prompt = tuple((7 * number + j) % 1000 + 3 for j in range(16))
        self._engine.submit(Request(str(number), prompt, Sampling(max_tokens=TOKENS, ignore_eos=True)), deliver)

    def close(self) -> None:
        """Begin no more."""
        self._ended.set()

    def span(self, seconds: float) -> list[float]:
        """The gaps of the next `seconds`."""
        start = len(self.gaps)
        time.sleep(seconds)
        return self.gaps[start:]


@contextmanager
def paced(host: Host, body: FitRequest) -> Iterator[None]:
    """A fit as the server runs it, again and again until the span ends."""
    jobs = Jobs()
    task = fit_task(body, host)

    def work(job: Job) -> Done:
        while True:
            task.work(job)

    jobs.submit(Task("fit", body.name, work))
    try:
        yield
    finally:
        jobs.close()


@contextmanager
def plain(host: Host, body: FitRequest) -> Iterator[None]:
    """The same fit on a thread like any other, without a rest."""
    stop = threading.Event()

    def pause() -> None:
        if stop.is_set():
            raise Cancelled

    def work() -> None:
        settings = FitSettings(positions="answer")
        rows = [[[message.plain() for message in row] for row in side] for side in (body.positive, body.negative)]  # type: ignore[union-attr]
        try:
            while True:
                fit_concept(host.plant, body.name, rows[0], rows[1], settings, pause=pause)
        except Cancelled:
            return

    worker = threading.Thread(target=work)
    worker.start()
    try:
        yield
    finally:
        stop.set()
        worker.join()


@contextmanager
def alone(host: Host, body: FitRequest) -> Iterator[None]:
    """Nobody else."""
    yield


def measure(host: Host, body: FitRequest, n: int, seconds: float, rounds: int) -> dict[str, Any]:
    """The spans' gaps, and their ratios to those of the spans without a job."""
    kinds: dict[str, Callable[..., Any]] = {"alone": alone, "paced": paced, "plain": plain}
    streams = Streams(host.engine, n)
    streams.span(1.0)
    found: dict[str, list[list[float]]] = {kind: [] for kind in SPANS}
    for _ in range(rounds):
        for kind in SPANS:
            with kinds[kind](host, body):
                time.sleep(0.3)  # encoding and the first pieces
                found[kind].append(streams.span(seconds))
    streams.close()
    rows = {kind: [_quantiles(gaps) for gaps in found[kind]] for kind in SPANS}
    summary: dict[str, Any] = {}
    for kind in SPANS:
        summary[kind] = {
            "tokens": sum(map(len, found[kind])),
            "median_ms": round(1e3 * statistics.median(row[0] for row in rows[kind]), 3),
            "p99_ms": round(1e3 * statistics.median(row[1] for row in rows[kind]), 3),
            **{
                f"{name}_ratio": round(
                    statistics.median(row[i] / base[i] for row, base in zip(rows[kind], rows["alone"], strict=True)), 3
                )
                for i, name in enumerate(("median", "p99"))
            },
        }
        print(f"{kind:6s} {summary[kind]}", flush=True)
    return summary


def _quantiles(gaps: list[float]) -> tuple[float, float]:
    ordered = sorted(gaps)
    return ordered[len(ordered) // 2], ordered[int(0.99 * (len(ordered) - 1))]


def main() -> None:
    """Measure, print and write the results."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", help="a checkpoint with a chat template; without it the embedded model")
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--streams", type=int, default=4)
    arguments.add_argument("--seconds", type=float, default=5.0)
    arguments.add_argument("--rounds", type=int, default=3)
    given = arguments.parse_args()
    plant = load_plant(given.model, given.device)
    engine = Engine(plant, EngineSettings(max_batch=max(8, given.streams), max_model_len=256))
    engine.start()
    positive, negative = contrast("positive", EXAMPLES, 5)
    body = FitRequest.model_validate(
        {"name": "sample", "positive": positive, "negative": negative, "method": FitMethod(positions="answer")}
    )
    with tempfile.TemporaryDirectory() as folder:
        host = Host(plant, engine, open_store(Path(folder)), served_name(given.model))
        summary = measure(host, body, given.streams, given.seconds, given.rounds)
    engine.stop()
    on_gpu = plant.device.type == "cuda"
    result = {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "model": served_name(given.model),
        "streams": given.streams,
        "seconds": given.seconds,
        "rounds": given.rounds,
        "spans": summary,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"interference-{plant.device.type}.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
