"""One step on the device: a packed batch and its frame in, logits and measurements out.

All tokens of a step, whoever they belong to, run as one sequence (1, T) through unmodified modelling code; rows and
masks are the attention's business, steering is that of the taps. A tap is installed when a program first needs its
site and costs a dictionary look-up from then on; a batch without steering launches nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from steering.plant.plant import Plant
from steering.runtime.attention import PagedAttention
from steering.runtime.bank import Bank
from steering.runtime.cache import BLOCK
from steering.runtime.compiled import Compiled
from steering.runtime.graphs import Graphs
from steering.runtime.launches import Account, Launches, Shape, room_for, source
from steering.runtime.norms import Norms
from steering.runtime.placement import Laid, Placement
from steering.runtime.scheduler import Batch, Segment
from steering.runtime.scope import Frame
from steering.runtime.shortcuts import Shortcuts
from steering.runtime.transfer import upload
from steering.runtime.visits import Visits
from steering.types import Site


class Output(NamedTuple):
    """Logits of the segments that draw a token, in their order, and the step's measurements if it was steered.

    judged_JV: the logits of the `judged` segments' positions, one after another; no rows if nobody asked.
    """

    sampled: tuple[Segment, ...]
    logits_BV: Tensor
    judged: tuple[Segment, ...]
    judged_JV: Tensor
    account: Account | None


class Runner:
    """Owns the engine's module tree and its taps. `graphs`, `compiled`: where decode steps may be graphs, and modules
    are compiled."""

    def __init__(
        self,
        plant: Plant,
        shell: nn.Module,
        attention: PagedAttention,
        bank: Bank,
        graphs: Graphs | None = None,
        compiled: Compiled | None = None,
    ) -> None:
        self._plant = plant
        self._shell = shell
        self._attention = attention
        self._bank = bank
        self._graphs = graphs
        self._compiled = compiled
        self._device = plant.device
        self._tapped: set[Site] = set()
        self._norms = Norms(plant, shell, waits=plant.device.type == "cuda")
        self._shortcuts = Shortcuts(plant, shell, attention.leave_out)
        self._visits = Visits(bank, self._norms)
        self._prepared: tuple[Frame, Launches] | None = None

    @torch.inference_mode()
    def __call__(self, batch: Batch, frame: Frame | None, drawn_T: Tensor | None = None) -> Output:
        """Run a step. Keys and values of its tokens are in the cache afterwards; running it twice changes nothing.

        drawn_T: the tokens of the batch, where they are on the device and not known yet; all of them draw then.
        """
        segments = batch.segments
        sampled = segments if drawn_T is not None else tuple(segment for segment in segments if segment.samples)
        judged = tuple(segment for segment in segments if segment.judged)
        keep = [segment.end for segment in sampled]
        keep += [s.offset + position - s.start for s in judged for position in s.judged]
        step = None if self._graphs is None else self._graphs(batch, frame, drawn_T, self._shape, self._run)
        if step is not None:
            work, logits_KV = step
            if keep != list(range(len(logits_KV))):
                logits_KV = logits_KV.index_select(0, upload(keep, self._device, torch.int64))
        else:
            work, logits_KV = self.forward(Laid.of(batch, BLOCK, is_known=drawn_T is None), frame, keep, drawn_T)
        account = None if frame is None or work is None else work.account(frame)
        return Output(sampled, logits_KV[: len(sampled)], judged, logits_KV[len(sampled) :], account)

    def forward(
        self, laid: Laid, frame: Frame | None, keep: Sequence[int], drawn_T: Tensor | None = None
    ) -> tuple[Launches | None, Tensor]:
        """The frame's tensors, and the logits of the tokens `keep` of a step that is laid out."""
        place = Placement.of(laid, self._device, drawn_T)
        work = None if frame is None else self._prepare(frame)
        return work, self._run(place, work, upload(keep, self._device, torch.int64))

    def erase(self, blocks: Sequence[int]) -> None:
        """Zero blocks of the pool whose sequence was spoilt."""
        self._attention.pool.clear(blocks)

    def _run(self, place: Placement, work: Launches | None, keep_K: Tensor | None) -> Tensor:
        """The forward pass: logits (K, V) of the tokens of `keep_K`, None for all."""
        self._attention.place = place
        self._visits.work = work
        if work is not None:
            work.clear()
            self._shortcuts.blank, self._shortcuts.sparse = work.shape.blank, work.shape.sparse
        try:
            logits_KV: Tensor = self._shell(
                input_ids=place.ids_T[None],
                position_ids=place.position_T[None],
                use_cache=False,
                logits_to_keep=0 if keep_K is None else keep_K,
            ).logits[0]
            self._norms.settle()
        finally:
            self._visits.end()
            self._norms.drop()
            self._shortcuts.blank = self._shortcuts.sparse = frozenset()
        return logits_KV

    def _prepare(self, frame: Frame) -> Launches:
        """The device side of a frame; that of the step before if the frame is the same."""
        if self._prepared is None or self._prepared[0] is not frame:
            shape = self._shape(frame, frame.slot_PT.shape[1], is_lasting=False)
            self._prepared = (frame, Launches.of(frame, shape, self._device))
        return self._prepared[1]

    def _shape(self, frame: Frame, n_tokens: int, *, is_lasting: bool) -> Shape:
        """The shape of a frame in a step of so many tokens, for which the model is made ready.

        is_lasting: whether other frames and other tensors of the bank may follow.
        """
        for route in frame.routes:
            self._tap(route.write)
            self._tap(route.read if route.read == route.write else source(route.read, frame.routes))
        for spot in frame.spots:
            self._tap(spot.gate.site)
        sparse = frozenset(
            route.write for p, route in enumerate(frame.routes) if route.form == "sparse" and frame.slot_PT[p].all()
        )
        return Shape(
            frame.routes,
            frame.knobs_TP3R.shape[3],
            self._shortcuts.blankable(frame.blanks, frame.routes),
            self._shortcuts.sparsifiable(sparse, n_tokens),
            room_for(frame, spare=is_lasting),
            self._plant.width,
            tuple(self._bank.routes[route].era for route in frame.routes) if is_lasting else (),
        )

    def _tap(self, site: Site) -> None:
        if site in self._tapped:
            return
        if self._compiled is not None:
            self._compiled.leave_out(site)
        if site.tap == "resid_post":  # where every law of A-LQR's kind writes: worth the cheaper way
            self._plant.build_in(self._shell, site.layer, self._look(site))
        else:
            self._plant.tap(self._shell, site, self._look(site))
        self._tapped.add(site)

    def _look(self, site: Site) -> Callable[[Tensor], Tensor | None]:
        """The tap of a site."""
        return self._visits.visit(site)
