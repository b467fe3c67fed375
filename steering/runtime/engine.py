"""The engine: requests in from any thread, events out, one step after another between them.

    take the inbox → schedule → resolve scopes → forward pass → draw → commit and deliver

One thread runs the steps; everything below `submit` and `abort` belongs to it. A step that fails as a whole is repeated
request by request, so that the one at fault ends alone.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Iterable

import torch

from steering.errors import BankFull, DimensionMismatch, Diverged, PlantError, QueueFull, SpecError, SteeringError
from steering.plant.plant import Plant
from steering.program import Program
from steering.runtime.bank import Bank, Knobs
from steering.runtime.detokenize import end_tokens, text_decoder
from steering.runtime.live import Deliver, Live
from steering.runtime.outcome import Outcome, compute
from steering.runtime.request import Event, Finished, LayerReading, Request
from steering.runtime.runner import Reading, Runner
from steering.runtime.sampler import Drawn
from steering.runtime.scheduler import Batch, Scheduler, Sequence
from steering.runtime.scope import Frame, Resolver, Steering, admitted
from steering.runtime.settings import EngineSettings, Stats
from steering.runtime.wiring import wire


class Engine:
    """Continuous batching of requests that are each steered in their own way.

    Raises SpecError if the cache does not fit in memory or `max_len` exceeds the model's context.
    """

    def __init__(self, plant: Plant, settings: EngineSettings | None = None) -> None:
        self.plant = plant
        self.settings = settings = settings or EngineSettings()
        shell, attention, self._cache = wire(plant, settings)
        self.max_len = self._cache.length
        """Positions a sequence may have: prompt and completion together."""
        self._bank = Bank(settings.program_slots, plant.device)
        self._runner = Runner(plant, shell, attention, self._bank, self.max_len)
        self._scheduler = Scheduler(settings.max_batch, settings.max_step_tokens)
        self._decode, self.eos = text_decoder(plant), end_tokens(plant)

        self._resolve = Resolver()
        self._live: dict[str, Live] = {}
        self._steerings: dict[str, Steering] = {}
        self._counts: Counter[str] = Counter()
        self._finished: Counter[str] = Counter()
        self._distinct = 0

        self._wake = threading.Condition()
        self._inbox: deque[tuple[Request, Deliver, float]] = deque()
        self._aborts: deque[str] = deque()
        self._outstanding: set[str] = set()
        self._closing = False
        self._thread: threading.Thread | None = None

    # ── from any thread ──────────────────────────────────────────────────────────────────────────────────────────────

    def submit(self, request: Request, deliver: Deliver) -> None:
        """Queue a request; its events go to `deliver`, on the engine's thread, and end with one `Finished`.

        Raises QueueFull, PlantError if it is longer than a row, DimensionMismatch or PlantError if its program does not
        fit the model, and SpecError for token ids out of the vocabulary or an id that is in use.
        """
        self._check(request)
        with self._wake:
            limit = self.settings.max_batch + self.settings.queue_limit
            if self._closing or len(self._outstanding) >= limit:
                self._counts["rejected"] += 1
                raise QueueFull(
                    "The server is shutting down: send the request to another one."
                    if self._closing
                    else f"All {limit} places are taken: try again in a moment."
                )
            if request.id in self._outstanding:
                raise SpecError("id", expected="an id that no running request has", got=request.id)
            self._outstanding.add(request.id)
            self._inbox.append((request, deliver, time.monotonic()))
            self._wake.notify_all()

    def abort(self, request_id: str) -> None:
        """End a request before the next step, with reason "abort". Does nothing if there is none of this id."""
        with self._wake:
            self._aborts.append(request_id)
            self._wake.notify_all()

    @property
    def is_closing(self) -> bool:
        """Whether `stop` was called: no request is taken any more."""
        return self._closing

    def start(self) -> None:
        """Run the steps on a thread of the engine's own, until `stop`."""
        if self._thread is None:
            self._closing = False
            self._thread = threading.Thread(target=self._serve, name="setpoint-engine", daemon=True)
            self._thread.start()

    def stop(self, drain_seconds: float = 0.0) -> None:
        """Refuse new requests, let the others finish for `drain_seconds`, abort the rest, end the thread."""
        with self._wake:
            self._closing = True
            if self._thread is not None:
                self._wake.wait_for(lambda: not self._outstanding, timeout=drain_seconds)
            self._aborts.extend(self._outstanding)
            self._wake.notify_all()
        if self._thread is None:
            self.step()
        else:
            self._thread.join()
            self._thread = None

    def generate(self, requests: Iterable[Request]) -> list[Finished]:
        """Run requests to their ends, in the order given; any number, whatever the queue's limit.

        Drives the steps itself when no thread does. Raises what `submit` raises, QueueFull only when shutting down.
        """
        waiting, order = deque(requests), list[str]()
        done: dict[str, Finished] = {}
        arrived = threading.Condition()

        def deliver(event: Event) -> None:
            if isinstance(event, Finished):
                with arrived:
                    done[event.request_id] = event
                    arrived.notify_all()

        while waiting or len(done) < len(order):
            while waiting and (self._closing or len(self._outstanding) < self.settings.max_batch):
                try:
                    self.submit(waiting[0], deliver)
                except QueueFull:
                    if self._closing:
                        raise
                    break  # others were quicker; their requests will make room
                order.append(waiting.popleft().id)
            if self._thread is None:
                self.step()
            else:
                with arrived:
                    arrived.wait(timeout=0.05)
        return [done[request_id] for request_id in order]

    def stats(self) -> Stats:
        """A look at the engine, from any thread; figures of one moment, not of one step."""
        running = list(self._scheduler.running.values())
        used = sum(sequence.computed * len(sequence.rows) for sequence in running)
        return Stats(
            running=len(running),
            waiting=len(self._outstanding) - len(running),
            kv_used_ratio=used / (self.settings.max_batch * self.max_len),
            programs_resident=len(self._bank),
            distinct_programs=self._distinct if running else 0,
            steps=self._counts["steps"],
            prompt_tokens=self._counts["prompt_tokens"],
            generated_tokens=self._counts["generated_tokens"],
            saturated_tokens=self._counts["saturated_tokens"],
            nonfinite=self._counts["nonfinite"],
            rejected=self._counts["rejected"],
            finished=dict(self._finished),
        )

    # ── on the engine's thread ───────────────────────────────────────────────────────────────────────────────────────

    def step(self) -> bool:
        """One step. False when there was nothing to do. Only for callers without `start`."""
        self._take_inbox()
        batch = self._scheduler.step(self._admit)
        if batch is None:
            return bool(self._scheduler.waiting)  # one was refused as it came to be admitted: go on with the next
        self._counts["steps"] += 1
        for outcome in self._compute(batch):
            self._commit(outcome)
        return True

    def _serve(self) -> None:
        while True:
            try:
                worked = self.step()
            except Exception as error:  # a defect of ours: nobody may wait for ever on a thread that died of it
                worked = True
                for live in list(self._live.values()):
                    self._finish(live.finished("error", error=_failed(error)))
            if worked:
                continue
            with self._wake:
                if self._closing and not self._outstanding:
                    return
                if not self._inbox and not self._aborts:
                    self._wake.wait()

    def _take_inbox(self) -> None:
        with self._wake:
            arrived, self._inbox = self._inbox, deque()
            aborted, self._aborts = self._aborts, deque()
        for request, deliver, when in arrived:
            n_rows = 2 if request.program.acts and request.program.guard.max_kl is not None else 1
            sequence = Sequence(request, n_rows)
            self._live[request.id] = Live.of(sequence, deliver, self._decode, self.eos)
            self._live[request.id].submitted = when
            self._scheduler.add(sequence)
        for request_id in aborted:
            if request_id in self._live:
                self._finish(self._live[request_id].finished("abort"))

    def _admit(self, sequence: Sequence) -> bool:
        """Make a program resident. False if all slots are held: the sequence waits until one is free."""
        program = sequence.request.program
        if program.acts:
            try:
                slot = self._bank.acquire(program)
            except BankFull:
                return False
            except Exception as error:  # out of memory while a program is uploaded is its request's own affair
                self._finish(self._live[sequence.request.id].finished("error", error=_failed(error)))
                return False
            steering = Steering.of(program, slot, Knobs.of(program), sequence.n_prompt)
            self._steerings[sequence.request.id] = steering
        self._live[sequence.request.id].admitted = time.monotonic()
        return True

    def _compute(self, batch: Batch) -> Iterable[Outcome]:
        """The batch's outcome; if it fails as a whole, that of each request that does not fail alone."""
        try:
            yield self._compute_whole(batch)
            return
        except Exception as error:  # whatever the step raised, it must not end the neighbours
            failure = error
        parts = list(batch.split())
        for part in parts:
            request_id = part.segments[0].sequence.request.id
            try:
                if len(parts) == 1:
                    raise failure
                yield self._compute_whole(part)
            except Exception as error:
                if self.plant.device.type == "cuda":
                    torch.cuda.empty_cache()
                self._finish(self._live[request_id].finished("error", error=_failed(error)))

    def _compute_whole(self, batch: Batch) -> Outcome:
        frame = self._resolve(batch, self._steerings, self._bank.rank)
        return compute(batch, frame, self._runner, lambda name: self._live[name].draw)

    def _commit(self, outcome: Outcome) -> None:
        """Record a step and deliver its events."""
        traces = self._account(outcome)
        tokens = {name: drawn.token for name, drawn in outcome.drawn.items() if name in self._live}
        self._counts["generated_tokens"] += len(tokens)
        self._counts["prompt_tokens"] += outcome.batch.n_prompt_tokens
        self._distinct = len({steering.program.shape for steering in self._steerings.values()})
        self._scheduler.commit(outcome.batch, tokens)
        for request_id, error in outcome.failed.items():
            if request_id in self._live:
                self._finish(self._live[request_id].finished("error", error=_failed(error)))
        for request_id, reports in outcome.judged.items():
            if request_id in self._live:
                self._live[request_id].judged += reports
        for request_id in tokens:
            live = self._live[request_id]
            trace = traces.get(request_id, ()) if live.request.trace else None
            self._push(live, outcome.drawn[request_id], trace)
        for segment in outcome.batch.segments:
            request_id = segment.sequence.request.id
            if segment.ends_unsampled and request_id in self._live:
                self._finish(self._live[request_id].finished("length"))

    def _push(self, live: Live, drawn: Drawn, trace: tuple[LayerReading, ...] | None) -> None:
        """Deliver what one drawn token turns into. What fails in it is its request's own affair."""
        try:
            delta, finished = live.push(drawn, trace)
        except Exception as error:
            self._finish(live.finished("error", error=_failed(error)))
            return
        if not self._hand_over(live, delta):
            finished = live.finished("abort")
        if finished is not None:
            self._finish(finished)

    def _account(self, outcome: Outcome) -> dict[str, tuple[LayerReading, ...]]:
        """Add a step's measurements to its requests and end those whose state is not finite. Returns the traces."""
        lost, traces = set(outcome.lost), {}
        ends = {s.sequence.request.id: s.end for s in outcome.batch.segments if s.samples and not s.is_shadow}
        if outcome.frame is not None and outcome.reading is not None:
            self._ask_gates(outcome.frame, outcome.reading)
            for steered in outcome.frame.steered:
                name = steered.request_id
                live = self._live[name]
                acted = admitted(steered, outcome.frame.spots, outcome.reading.gates)
                if live.tally is None or not live.tally.add(acted, outcome.reading):
                    lost.add(name)
                elif live.request.trace and name in ends:
                    traces[name] = live.tally.trace(acted, outcome.reading, ends[name])
        for name in lost:
            self._counts["nonfinite"] += 1
            live = self._live[name]
            self._finish(live.finished("error", error=_diverged(live.request)))
        for name, divergence in outcome.kl.items():
            if name not in lost and (tally := self._live[name].tally) is not None:
                tally.add_kl(divergence.kl, divergence.is_limited)
        return traces

    def _ask_gates(self, frame: Frame, reading: Reading) -> None:
        """Record what the gates of a step measured; those of a prompt's last token decide what follows."""
        for spot, z_K in zip(frame.spots, reading.gates, strict=True):
            tally = self._live[spot.request_id].tally
            if tally is not None:
                tally.add_gate(spot, z_K)
            if spot.gate.when.on == "prompt":
                self._steerings[spot.request_id].decide(spot.term, spot.gate.is_open(float(z_K[-1])))

    def _finish(self, finished: Finished) -> None:
        """Take a request out of the engine, free what it held, deliver its end."""
        live = self._live.pop(finished.request_id)
        rows = live.sequence.rows
        self._scheduler.remove(finished.request_id)
        for row in rows:
            self._cache.clear(row, len(live.sequence.tokens))
        if self._steerings.pop(finished.request_id, None) is not None:
            self._bank.release(live.request.program)
        if live.tally is not None:
            self._counts["saturated_tokens"] += live.tally.saturated
        self._finished[finished.reason] += 1
        with self._wake:
            self._outstanding.discard(finished.request_id)
            self._wake.notify_all()
        self._hand_over(live, finished)

    def _hand_over(self, live: Live, event: Event) -> bool:
        """Deliver an event. False if the receiver failed, which is its request's own affair."""
        try:
            live.deliver(event)
        except Exception:
            return False
        return True

    def _check(self, request: Request) -> None:
        """What can only be known beside the model: lengths, token ids, sites and widths."""
        n_prompt, sampling = len(request.prompt), request.sampling
        if n_prompt + sampling.max_tokens > self.max_len:
            raise PlantError(
                f"The prompt has {n_prompt} tokens and max_tokens is {sampling.max_tokens}: expected at most "
                f"{self.max_len} together; shorten one of them.",
                param="prompt" if n_prompt >= self.max_len else "max_tokens",
            )
        ids = {"prompt": request.prompt, "stop_token_ids": sampling.stop_token_ids, "logit_bias": sampling.logit_bias}
        for name, tokens in ids.items():
            if any(not 0 <= token < self.plant.vocab for token in tokens):
                raise SpecError(name, expected=f"token ids from 0 to {self.plant.vocab - 1}")
        if request.program.acts:
            self._check_program(request.program)
            if request.program.guard.max_kl is not None and self.settings.max_batch < 2:
                raise SpecError("guard.max_kl", expected="an engine with max_batch >= 2, for the unsteered twin")

    def _check_program(self, program: Program) -> None:
        for route, law in program.laws.items():
            widths = (self.plant.width_of(route.read), self.plant.width_of(route.write))
            if law.widths != widths:
                raise DimensionMismatch(f"The law on {route} has widths {law.widths}: expected {widths}, the model's.")


def _diverged(request: Request) -> Diverged | SteeringError:
    """The error of a request whose state is no longer finite."""
    if not request.program.acts:
        return SteeringError("The model produced numbers that are not finite for this prompt.")
    return Diverged(
        "The control drove the state out of the range of its number format: lower the setpoint or the strength, or set "
        "guard.max_effort.",
        param="steering",
    )


def _failed(error: Exception) -> SteeringError:
    """The error of a request whose computation raised."""
    if isinstance(error, SteeringError):
        return error
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return SteeringError("This request ran out of memory: send a shorter prompt.")
    return SteeringError(f"The computation of this request failed ({type(error).__name__}).")
