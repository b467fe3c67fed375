"""The engine: requests in from any thread, events out, one step after another between them.

    take the inbox → schedule → resolve scopes → launch: forward pass, draw → land → commit and deliver

One thread runs the steps; everything below `submit` and `abort` belongs to it. A step that fails as a whole is repeated
request by request, so that the one at fault ends alone. On a GPU a step that only goes on with completions is launched
before the one before it lands, so that the device does not wait for the host (`steering.runtime.flights`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from kernels import warm
from steering.errors import BankFull
from steering.plant.plant import Plant
from steering.runtime.bank import Bank
from steering.runtime.blocks import Blocks
from steering.runtime.cache import BLOCK
from steering.runtime.checks import check, diverged, failed, n_rows
from steering.runtime.compiled import Compiled
from steering.runtime.desk import Desk, hand_over
from steering.runtime.detokenize import end_tokens, text_decoder
from steering.runtime.flights import Flight, following, launch
from steering.runtime.graphs import Graphs
from steering.runtime.launches import Reading
from steering.runtime.ledger import Ledger
from steering.runtime.live import Deliver, Live
from steering.runtime.outcome import Outcome
from steering.runtime.parallel import Parts, lead
from steering.runtime.prefix import Record, record, share
from steering.runtime.receipt import Tally
from steering.runtime.request import Finished, LayerReading, Request
from steering.runtime.runner import Runner
from steering.runtime.sampler import Drawn
from steering.runtime.scheduler import Batch, Scheduler, Segment, Sequence
from steering.runtime.scope import Frame, Resolver, Steering, admitted
from steering.runtime.settings import EngineSettings, Stats
from steering.runtime.wiring import wire


class Engine(Desk):
    """Continuous batching of requests that are each steered in their own way.

    Raises SpecError if the cache does not fit in memory or `max_model_len` exceeds the model's context.
    """

    def __init__(self, plant: Plant, settings: EngineSettings | None = None) -> None:
        settings = settings or EngineSettings()
        super().__init__(settings)
        self.plant = plant
        on_gpu = plant.device.type == "cuda" and plant.crew is None
        if plant.crew is not None:
            parts = lead(plant, settings)
        else:
            shell, attention, longest = wire(plant, settings)
            bank = Bank(settings.program_slots, plant.device)
            has_graphs = on_gpu if settings.graphs is None else settings.graphs
            graphs = Graphs(settings.max_batch, -(-longest // BLOCK), plant.device) if has_graphs else None
            compiled = Compiled(plant, shell) if settings.compile else None
            parts = Parts(Runner(plant, shell, attention, bank, graphs, compiled), bank, attention.pool, longest)
        self._runner, self._bank, self._pool, self.max_model_len = parts
        """Positions a sequence may have: prompt and completion together."""
        self._looks_ahead = on_gpu if settings.pipeline is None else settings.pipeline
        self._flight: Flight | None = None
        self._blocks: Blocks[Record] = Blocks(self._pool.n_blocks, BLOCK)
        self._scheduler = Scheduler(settings.max_batch, settings.max_step_tokens, self._blocks)
        self._decode, self.eos = text_decoder(plant), end_tokens(plant)

        self._resolve = Resolver()
        self._ledger = Ledger()
        self._steerings: dict[str, Steering] = {}
        self._distinct = 0
        self._thread: threading.Thread | None = None

    # ── from any thread ──────────────────────────────────────────────────────────────────────────────────────────────

    def submit(self, request: Request, deliver: Deliver) -> None:
        """Queue a request; its events go to `deliver`, on the engine's thread, and end with one `Finished`.

        Raises QueueFull, PlantError if it is longer than a row, DimensionMismatch or PlantError if its program does not
        fit the model, and SpecError for token ids out of the vocabulary or an id that is in use.
        """
        check(request, self.plant, self.max_model_len, self.settings.max_batch, self._blocks)
        self._bank.prepare(request.program)
        self._queue(Live.of(Sequence(request, n_rows(request)), deliver, self._decode, self.eos))

    def start(self) -> None:
        """Run the steps on a thread of the engine's own, until `stop`; the kernels are compiled first."""
        if self._thread is None:
            if self.plant.device.type == "cpu":
                warm()
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

    def stats(self) -> Stats:
        """A look at the engine, from any thread; figures of one moment, not of one step."""
        running = len(self._scheduler.running)
        return Stats(
            running=running,
            waiting=len(self._outstanding) - running,
            kv_used_ratio=1 - self._blocks.available / len(self._blocks),
            programs_resident=len(self._bank),
            distinct_programs=self._distinct if running else 0,
            steps=self._counts["steps"],
            prompt_tokens=self._counts["prompt_tokens"] + self._scheduler.n_cached,
            generated_tokens=self._counts["generated_tokens"],
            saturated_tokens=self._counts["saturated_tokens"],
            nonfinite=self._counts["nonfinite"],
            rejected=self._counts["rejected"],
            preempted=self._scheduler.n_preempted,
            prefix_tokens=self._counts["prefix_tokens"],
            cached_tokens=self._scheduler.n_cached,
            finished=dict(self._finished),
        )

    # ── on the engine's thread ───────────────────────────────────────────────────────────────────────────────────────

    def _drive(self) -> bool:
        if self._thread is not None:
            return False
        self.step()
        return True

    def step(self) -> bool:
        """One step: land the one in the air, or launch one and land it, with the next one launched in between if it
        may be. False when there was nothing to do. Only for callers without `start`."""
        self._take_inbox()
        flight, self._flight = self._flight or self._depart(), None
        if flight is None:
            return bool(self._scheduler.waiting)  # one was refused as it came to be admitted: go on with the next
        self._flight = self._follow(flight)
        for outcome in self._land(flight):
            self._commit(outcome)
        if self._flight is not None and not self._present(self._flight.batch).segments:
            self._flight = None
        return True

    def _depart(self) -> Flight | None:
        """Launch what the scheduler has; None if that is nothing."""
        batch = self._scheduler.step(self._admit)
        if batch is None:
            return None
        self._inherit()
        return self._launch(batch)

    def _follow(self, flight: Flight) -> Flight | None:
        """Launch the step after one in the air, from tokens that are not known yet. None if there is more to decide.

        Who ends with the very token in the air is left out. Who turns out to have ended otherwise is thrown away.
        """
        if not self._looks_ahead or flight.drawn_T is None:
            return None
        present, keep, is_ending = {id(s) for s in self._present(flight.batch).segments}, list[int](), False
        for i, segment in enumerate(flight.batch.segments):
            if id(segment) not in present:
                continue
            draw = self._live[segment.sequence.request.id].draw
            if not draw.is_steady:
                return None
            if draw.step + 1 >= draw.sampling.max_tokens:
                is_ending = True
            else:
                keep.append(i)
        batch = self._scheduler.follow(flight.batch, keep, len(present), makes_room=is_ending)
        after = None if batch is None else self._launch(batch, following(flight, keep))
        return None if after is None or after.error is not None else after

    def _serve(self) -> None:
        while True:
            try:
                worked = self.step()
            except Exception as error:  # a defect of ours: nobody may wait for ever on a thread that died of it
                worked, self._flight = True, None
                for live in list(self._live.values()):
                    self._finish(live.finished("error", error=failed(error)))
            if worked:
                continue
            with self._wake:
                if self._closing and not self._outstanding:
                    return
                if not self._inbox and not self._aborts:
                    self._wake.wait()

    def _take_inbox(self) -> None:
        arrived, aborted = self._take()
        for live in arrived:
            self._live[live.request.id] = live
            self._scheduler.add(live.sequence)
        for request_id in aborted:
            if request_id in self._live:
                self._finish(self._live[request_id].finished("abort"))

    def _admit(self, sequence: Sequence) -> bool:
        """Make a program resident. False if all slots are held: the sequence waits until one is free."""
        live, program = self._live[sequence.request.id], sequence.request.program
        if live.admitted is not None:  # it ran before and gave only its blocks away
            return True
        if program.acts:
            try:
                slot = self._bank.acquire(program)
            except BankFull:
                return False
            except Exception as error:  # out of memory while a program is uploaded is its request's own affair
                self._finish(self._live[sequence.request.id].finished("error", error=failed(error)))
                return False
            steering = Steering.of(program, slot, self._bank.knobs(program), sequence.n_prompt)
            self._steerings[sequence.request.id] = steering
            self._distinct = distinct(self._steerings)
        if self.settings.prefix_cache:
            share(sequence, self._steerings.get(sequence.request.id), BLOCK)
            self._counts["prefix_tokens"] += sequence.n_shareable * BLOCK
        live.admitted = time.monotonic()
        return True

    def _inherit(self) -> None:
        """Add to the receipts what was measured in the blocks that requests took over."""
        for sequence in self._scheduler.running.values():
            if sequence.inherited:
                tally = self._live[sequence.request.id].tally
                for steered, reading in sequence.inherited:
                    if tally is not None:
                        tally.add(steered, reading)
                sequence.inherited.clear()

    def _launch(self, batch: Batch, drawn_T: Tensor | None = None) -> Flight:
        """Launch a batch. What that fails with is raised when it lands."""
        try:
            frame = self._resolve(batch, self._steerings, self._bank.rank)
            return launch(batch, frame, self._runner, lambda name: self._live[name].draw, drawn_T)
        except Exception as error:  # whatever the step raised, it must not end the neighbours
            return Flight(batch, error=error)

    def _present(self, batch: Batch) -> Batch:
        """The part of a launched batch whose requests still run."""

        def runs(segment: Segment) -> bool:
            live = self._live.get(segment.sequence.request.id)
            return live is not None and live.sequence is segment.sequence  # an id may come again

        return batch if all(map(runs, batch.segments)) else batch.only(tuple(filter(runs, batch.segments)))

    def _land(self, flight: Flight) -> Iterable[Outcome]:
        """The outcome of a launched step; if it fails as a whole, that of each request that does not fail alone."""
        batch = self._present(flight.batch)
        if not batch.segments:
            return
        self._counts["steps"] += 1
        try:
            yield flight.land().within(batch)
            return
        except Exception as error:  # as above
            failure = error
        self._flight = None  # it was launched from tokens that may be wrong
        parts = list(batch.split(BLOCK))
        for part in parts:
            request_id = part.segments[0].sequence.request.id
            try:
                if len(parts) == 1:
                    raise failure
                yield self._launch(part).land()
            except Exception as error:
                if self.plant.device.type == "cuda":
                    torch.cuda.empty_cache()
                self._finish(self._live[request_id].finished("error", error=failed(error)))

    def _commit(self, outcome: Outcome) -> None:
        """Record a step and deliver its events."""
        traces = self._account(outcome)
        tokens = {name: drawn.token for name, drawn in outcome.drawn.items() if name in self._live}
        self._counts["generated_tokens"] += len(tokens)
        self._counts["prompt_tokens"] += outcome.batch.n_prompt_tokens
        self._scheduler.commit(outcome.batch, tokens, partial(record, outcome.reading, self._steerings, BLOCK))
        for request_id, error in outcome.failed.items():
            if request_id in self._live:
                self._finish(self._live[request_id].finished("error", error=failed(error)))
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
            self._finish(live.finished("error", error=failed(error)))
            return
        if not hand_over(live, delta):
            finished = live.finished("abort")
        if finished is not None:
            self._finish(finished)

    def _account(self, outcome: Outcome) -> dict[str, tuple[LayerReading, ...]]:
        """Add a step's measurements to its requests and end those whose state is not finite. Returns the traces."""
        lost, traces = set(outcome.lost), {}
        if outcome.frame is not None and outcome.reading is not None:
            self._ask_gates(outcome.frame, outcome.reading)
            lost |= self._ledger.add(outcome.frame, outcome.reading, self._tally)
            traced = {name for name, live in self._live.items() if live.request.trace} - lost
            samples = (s for s in outcome.batch.segments if traced and s.samples and not s.is_shadow)
            ends = {s.sequence.request.id: s.end for s in samples if s.sequence.request.id in traced}
            for steered in outcome.frame.steered if ends else ():
                name = steered.request_id
                if name in ends:
                    acted = admitted(steered, outcome.frame.spots, outcome.reading.gates)
                    traces[name] = self._tally(name).trace(acted, outcome.reading, ends[name])
        for name in lost:
            self._counts["nonfinite"] += 1
            live = self._live[name]
            self._finish(live.finished("error", error=diverged(live.request)))
        for name, divergence in outcome.kl.items():
            if name not in lost:
                self._tally(name).add_kl(divergence.kl, divergence.is_limited)
        return traces

    def _tally(self, name: str) -> Tally:
        """The tally of a request that is steered."""
        tally = self._live[name].tally
        assert tally is not None, "what steers has terms, and what has terms is tallied"
        return tally

    def _ask_gates(self, frame: Frame, reading: Reading) -> None:
        """Record what the gates of a step measured; those of a prompt's last token decide what follows."""
        for spot, z_K in zip(frame.spots, reading.gates, strict=True):
            if not len(new_K := z_K[spot.n_counted :]):
                continue
            self._tally(spot.request_id).add_gate(spot, new_K)
            if spot.gate.when.on == "prompt":
                self._steerings[spot.request_id].decide(spot.term, spot.gate.is_open(float(z_K[-1])))

    def _finish(self, finished: Finished) -> None:
        """Take a request out of the engine, free what it held, deliver its end."""
        live = self._live.pop(finished.request_id)
        # Who has drawn a token had finite logits, so all that they depend on is finite too.
        is_doubtful = finished.reason == "error" or (finished.reason == "abort" and not finished.tokens)
        spoilt = self._scheduler.remove(finished.request_id, is_spoilt=is_doubtful)
        if spoilt:
            self._runner.erase(spoilt)
        if self._steerings.pop(finished.request_id, None) is not None:
            self._bank.release(live.request.program)
            self._distinct = distinct(self._steerings)
        self._leave(live, finished)


def distinct(steerings: Mapping[str, Steering]) -> int:
    """How many different steerings there are among some requests."""
    return len({steering.program.shape for steering in steerings.values()})
