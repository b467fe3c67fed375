"""One worker's steering: programs in, a step's tokens steered where they are, measurements out.

    begin     requests that end give their slots back, new ones have their programs read
    forward   who is in the batch, in which order → frame → tensors of the step
    whole,    called by the hooks, at every site: laws and edits run, gates are asked
    pair
    end       measurements on their way to the host; they are read when the next step begins, or by `take`

Bank, scopes, gates and kernels are those of the native engine. Every rank of a tensor-parallel group does the same and
measures the same; rank 0 keeps the account. Only the first n rows of a tensor are tokens, the others fill a graph up.

Fail closed: a step in which a hook that should have run did not is an error, not an unsteered step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steering.errors import BankFull, SteeringError
from steering.runtime.bank import Bank
from steering.runtime.launches import Account, Launches, Shape, room_for
from steering.runtime.request import Request
from steering.runtime.scheduler import Batch, Segment
from steering.runtime.scheduler import Sequence as Running
from steering.runtime.scope import Frame, Resolver, Steering
from steering.runtime.transfer import Download
from steering.runtime.visits import Apart, Visits
from steering.types import Site, Tap
from steering.vllm.attachment import ASKED, KEY, Attachment, share_name
from steering.vllm.outbox import Outbox
from steering.vllm.sites import Act, Place, Sites
from steering.vllm.traced import acting

Gather = Callable[[Tensor], Tensor]
"""A slice of every rank's → all of them, side by side in the last dimension."""


class Ranks(NamedTuple):
    """A tensor-parallel group, as one of its ranks sees it."""

    rank: int
    size: int
    gather: Gather


class _Flight(NamedTuple):
    """A steered step whose measurements are not read yet."""

    batch: Batch
    frame: Frame | None
    account: Account | None
    watched: tuple[Segment, ...]
    download: Download


class Controller:
    """The steering of one worker.

    is_compiled: the hooks are in compiled graphs, so those of `places` are all that there will ever be.
    """

    def __init__(self, sites: Sites, ranks: Ranks, slots: int, device: torch.device, *, is_compiled: bool) -> None:
        self.sites = sites
        self.ranks = ranks
        self.places: dict[str, Place] = {}
        self.is_compiled = is_compiled
        self.outbox = Outbox()
        self._device = device
        self._bank = Bank(slots, device)
        self._visits = Visits(self._bank, Apart())
        self._resolve = Resolver()
        self._running: dict[str, Running] = {}
        self._attached: dict[str, Attachment] = {}
        self._steerings: dict[str, Steering] = {}
        self._holding: set[str] = set()
        self._prepared: tuple[Frame, Launches] | None = None
        self._flight: _Flight | None = None
        self._batch: Batch | None = None
        self._frame: Frame | None = None
        self._n_tokens = 0
        self._due: frozenset[str] = frozenset()
        self._seen: set[str] = set()

    # ── before the forward pass ──────────────────────────────────────────────────────────────────────────────────────

    def begin(self, finished: Iterable[str], arrived: Iterable[Any]) -> None:
        """Begin a step: vLLM's ids of the requests that ended, and its data of those that are new here."""
        self.land()
        for request_id in finished:
            self._running.pop(request_id, None)
            self._drop(request_id)
            self._attached.pop(request_id, None)
            self._steerings.pop(request_id, None)
        for data in arrived:
            if data.req_id not in self._running:  # vLLM announces again what it had interrupted
                self._add(data)

    def _add(self, data: Any) -> None:
        args = getattr(data.sampling_params, "extra_args", None) or {}
        if KEY not in args:
            if ASKED in args:
                raise SteeringError("A request asks for steering that was not compiled: it cannot be run.")
            self._running[data.req_id] = Running(Request(data.req_id, (0,)))
            return
        prompt = tuple(data.prompt_token_ids)
        try:
            attached = Attachment.read(args[KEY])
            self._check(attached)
        except SteeringError as error:
            self._running[data.req_id] = Running(Request(data.req_id, prompt))
            self.outbox.fail(share_name(args[KEY]["name"], data.req_id, args[KEY].get("choices", 1)), error.message)
            return
        self._running[data.req_id] = Running(Request(data.req_id, prompt, program=attached.program))
        self._attached[data.req_id] = attached

    def _check(self, attached: Attachment) -> None:
        """Raises SteeringError for a program that this worker cannot carry out."""
        for route in attached.program.laws:
            for site in (route.read, route.write):
                if not self.can_tap(site):
                    raise SteeringError(f"This worker has no tap at {site}.")
        for term in attached.program.terms:
            if term.gate is not None and not self.can_tap(term.gate.site):
                raise SteeringError(f"This worker has no tap at {term.gate.site}.")

    def can_tap(self, site: Site) -> bool:
        """Whether a program may read or write a site here."""
        if site.tap not in self.sites.taps or not 0 <= site.layer < self.sites.depth:
            return False
        return not self.is_compiled or self.sites.place(site).name in self.places

    def forward(self, order: Sequence[tuple[str, int, int]]) -> None:
        """Get ready for a forward pass over (vLLM's id, tokens computed before, tokens now), packed in this order."""
        segments, offset = [], 0
        for request_id, start, length in order:
            segments.append(Segment(self._running[request_id], 0, start, length, offset))
            offset += length
        n_decode = sum(segment.length == 1 for segment in segments)
        self._batch = batch = Batch(tuple(segments), n_decode, offset)
        self._n_tokens = offset
        if not self._attached:
            return
        self._admit([request_id for request_id, _, _ in order if request_id in self._attached])
        self._frame = frame = self._resolve(batch, self._steerings, self._bank.rank)
        if frame is not None:
            self._visits.work = work = self._prepare(frame)
            work.clear()
            self._seen.clear()

    def _admit(self, wanted: Sequence[str]) -> None:
        """Make the programs of a step resident. Those that wait make room, if need be: vLLM interrupts requests."""
        for request_id in wanted:
            if request_id in self._holding:
                continue
            program = self._attached[request_id].program
            try:
                slot = self._bank.acquire(program)
            except BankFull:
                for waiting in sorted(self._holding - set(wanted)):
                    self._drop(waiting)
                self._resolve = Resolver()  # a frame that is kept may have a slot that was given away
                slot = self._bank.acquire(program)
            self._holding.add(request_id)
            if (steering := self._steerings.get(request_id)) is None:
                n_prompt = self._running[request_id].n_prompt
                self._steerings[request_id] = Steering.of(program, slot, self._bank.knobs(program), n_prompt)
            else:
                steering.slot = slot

    def _drop(self, request_id: str) -> None:
        if request_id in self._holding:
            self._holding.discard(request_id)
            self._bank.release(self._attached[request_id].program)

    def _prepare(self, frame: Frame) -> Launches:
        """The device side of a frame; that of the step before if the frame is the same."""
        if self._prepared is None or self._prepared[0] is not frame:
            shape = Shape(
                frame.routes,
                frame.knobs_TP3R.shape[3],
                frozenset(),
                frozenset(),
                room_for(frame, spare=False),
                self.sites.width,
            )
            work = Launches.of(frame, shape, self._device)
            self._prepared = (frame, work)
            sites = {*work.writes, *work.kept, *(spot.gate.site for spot in frame.spots)}
            # Hooks of one module run in the order they came, and gather: it must be the same on every rank.
            self._due = frozenset([self._install(site) for site in sorted(sites)])
        return self._prepared[1]

    def _install(self, site: Site) -> str:
        """The name of a site's place, where a hook is from now on."""
        place = self.sites.place(site)
        if place.name not in self.places:
            self.places[place.name] = place
            self.sites.hook(place, self)
        return place.name

    def install_all(self, taps: Sequence[Tap], act: Act) -> None:
        """Hooks that call `act` at all sites of some taps, for a model that is about to be compiled."""
        for tap in taps:
            for layer in range(1 if tap == "final" else self.sites.depth):
                place = self.sites.place(Site(tap, layer))
                if place.name not in self.places:
                    self.places[place.name] = place
                    self.sites.hook(place, act)

    # ── in it ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def running(self) -> AbstractContextManager[None]:
        """While the model runs: hooks in compiled graphs are this controller's."""
        return acting(self)

    def wants(self, place: str) -> bool:
        """Whether anything is to be done at a place in this step."""
        return self._visits.work is not None and place in self._due

    def whole(self, state: Tensor, place: str) -> None:
        """Steer the sites of a place, whose tensor this is, in place."""
        if not self.wants(place):
            return
        self._seen.add(place)
        own = self.places[place]
        rows_TD = state.view(-1, state.shape[-1])[: self._n_tokens]  # never a copy, which would go unread
        if own.columns is None and not own.is_sharded:
            self._act(own, rows_TD)
            return
        part_TD = rows_TD if own.columns is None else rows_TD[:, own.columns]
        whole_TD = self.ranks.gather(part_TD.contiguous()) if own.is_sharded else part_TD.contiguous()
        if self._act(own, whole_TD):
            width = part_TD.shape[1]
            start = self.ranks.rank * width if own.is_sharded else 0
            part_TD.copy_(whole_TD[:, start : start + width])

    def pair(self, hidden: Tensor, residual: Tensor, place: str) -> None:
        """Steer the sites of a place whose state is the sum of two tensors, in place."""
        if not self.wants(place):
            return
        self._seen.add(place)
        hidden_TD, residual_TD = hidden[: self._n_tokens], residual[: self._n_tokens]
        state_TD = hidden_TD + residual_TD
        own, work = self.places[place], self._visits.work
        if self._act(own, state_TD) and work is not None:
            routes = [p for site in own.sites for p, _, _ in work.writes.get(site, ())]
            is_steered_T1 = (work.slot_PT[routes] != 0).any(0)[:, None]
            residual_TD.copy_(torch.where(is_steered_T1, state_TD, residual_TD))
            hidden_TD.masked_fill_(is_steered_T1, 0)

    def _act(self, place: Place, rows_TD: Tensor) -> bool:
        """Do what a step does at the sites of a place. Whether the state may have changed."""
        work = self._visits.work
        assert work is not None, "asked by `wants`"
        changed = False
        for site in place.sites:
            runs, names, gates = work.visits.get(site) or self._visits.plan(work, site)
            if gates is not None:
                gates.measure(site, rows_TD, work.knobs_TP3R[:, :, 1])
            for run, read in runs:
                run(rows_TD, rows_TD if read is None else self._visits.states[read])
                changed = True
            for name in names:
                # Memory of a graph belongs to its next piece as soon as this one is over.
                self._visits.states[name] = rows_TD.clone() if self.is_compiled else rows_TD
        return changed

    # ── behind it ────────────────────────────────────────────────────────────────────────────────────────────────────

    def end(self, output: Tensor | None) -> None:
        """End a forward pass whose last hidden states these are; None if it failed. Raises SteeringError if a hook that
        was due did not run."""
        batch, frame, work, seen = self._batch, self._frame, self._visits.work, self._seen
        self._batch = self._frame = None
        self._visits.end()
        if output is None or batch is None:
            return
        if work is not None and not self._due <= seen:
            missing = ", ".join(sorted(self._due - seen))
            raise SteeringError(f"The model did not come past {missing}: this step was not steered as it should be.")
        watched = tuple(s for s in batch.segments if s.sequence.request.id in self._steerings)
        if watched:
            last = torch.tensor([segment.end for segment in watched], device=output.device)
            tensors = [output[last].to(torch.float32).sum(-1).isfinite()]
            account = None if work is None or frame is None else work.account(frame)
            tensors += [] if account is None else account.tensors
            self._flight = _Flight(batch, frame, account, watched, Download(tensors))
        for segment in batch.segments:
            segment.sequence.counted = max(segment.sequence.counted, segment.start + segment.length)

    def land(self) -> None:
        """Read what the step before measured."""
        flight, self._flight = self._flight, None
        if flight is None:
            return
        is_finite, *measured = flight.download.wait()
        for segment, fine in zip(flight.watched, is_finite.tolist(), strict=True):
            if not fine:
                self.outbox.lose(self._name(segment.sequence.request.id), segment.start + segment.length - 1)
        if flight.account is None or flight.frame is None:
            return
        reading = flight.account.reading(measured)
        for spot, z_K in zip(flight.frame.spots, reading.gates, strict=True):
            if spot.gate.when.on == "prompt" and spot.request_id in self._steerings:
                self._steerings[spot.request_id].decide(spot.term, spot.gate.is_open(float(z_K[-1])))
        if self.ranks.rank == 0:
            self.outbox.add(flight.batch, flight.frame, reading, self._steerings, self._name)

    def _name(self, request_id: str) -> str:
        attached = self._attached[request_id]
        return share_name(attached.name, request_id, attached.choices)

    def take(self) -> bytes:
        """All that was measured since the last time, which is forgotten here. Nothing on other ranks than the first."""
        self.land()
        parcel = self.outbox.take()
        return parcel if self.ranks.rank == 0 else b""
