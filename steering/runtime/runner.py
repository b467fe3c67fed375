"""One step on the device: a packed batch and its frame in, logits and measurements out.

All tokens of a step, whoever they belong to, run as one sequence (1, T) through unmodified modelling code; rows and
masks are the attention's business, steering is that of the taps. A tap is installed when a program first needs its
site and costs a dictionary look-up from then on; a batch without steering launches nothing.

What a law reads: a law that writes the site it reads sees what the model and the edits made there, before any other
route's control. A law that writes elsewhere sees its site as the model goes on with it, all controls there included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernels import bind, feedback_, mask_, sparsify_, turn_
from kernels.binding import Bound
from steering.plant.plant import Plant
from steering.runtime.attention import PagedAttention
from steering.runtime.bank import Bank
from steering.runtime.cache import BLOCK
from steering.runtime.compiled import Compiled
from steering.runtime.graphs import Graphs
from steering.runtime.launches import Account, Launches, Shape, Visit, room_for, source
from steering.runtime.norms import Norms
from steering.runtime.placement import Placement
from steering.runtime.scheduler import Batch, Segment
from steering.runtime.scope import Frame
from steering.runtime.shortcuts import Shortcuts
from steering.runtime.transfer import upload
from steering.types import Form, Route, Site

OPERATORS: Mapping[Form, Callable[..., None]] = {"law": feedback_, "mask": mask_, "turn": turn_, "sparse": sparsify_}
RESIDENT: Mapping[Form, tuple[str, ...]] = {
    "law": ("probe", "gain", "norm", "limit", "knee", "floor", "relative"),
    "mask": ("scale", "shift", "low", "high", "channel"),
    "turn": ("plane", "adaptive", "channel"),
    "sparse": ("weight", "threshold", "count", "rest", "channel"),
}
"""What each operator takes of the bank, in its order."""


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
        self._launches: Launches | None = None
        self._prepared: tuple[Frame, Launches] | None = None
        self._states: dict[Site, Tensor] = {}

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
            place = Placement.of(batch, BLOCK, self._device, drawn_T)
            work = None if frame is None else self._prepare(frame)
            logits_KV = self._run(place, work, upload(keep, self._device, torch.int64))
        account = None if frame is None or work is None else work.account(frame)
        return Output(sampled, logits_KV[: len(sampled)], judged, logits_KV[len(sampled) :], account)

    def _run(self, place: Placement, work: Launches | None, keep_K: Tensor | None) -> Tensor:
        """The forward pass: logits (K, V) of the tokens of `keep_K`, None for all."""
        self._attention.place = place
        self._launches = work
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
            self._launches = None
            self._norms.drop()
            self._shortcuts.blank = self._shortcuts.sparse = frozenset()
            self._states.clear()
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
            self._plant.build_in(self._shell, site.layer, self._visit(site))
        else:
            self._plant.tap(self._shell, site, self._visit(site))
        self._tapped.add(site)

    def _visit(self, site: Site) -> Callable[[Tensor], Tensor | None]:
        """The tap of a site: launch the laws that write it, keep it for those that read it later."""
        # What a module reads may be the residual itself (OLMo-2), which must not change with it.
        is_input = site.tap in ("attn_in", "mlp_in")

        def visit(state: Tensor) -> Tensor | None:
            work = self._launches
            if work is None:
                return None
            if (todo := work.visits.get(site)) is None:
                todo = work.visits[site] = self._plan(work, site)
            runs, names, gates = todo
            if runs or gates is not None:
                self._norms.flush()
            elif not names:
                return None
            changed = state.clone() if runs and is_input else state
            rows_TD = changed.select(0, 0)
            if gates is not None:
                gates.measure(site, rows_TD, work.knobs_TP3R[:, :, 1])
            for run, read in runs:
                run(rows_TD, rows_TD if read is None else self._states[read])
            for name in names:
                self._states[name] = rows_TD
            return None if changed is state else changed

        return visit

    def _plan(self, work: Launches, site: Site) -> Visit:
        """What a step does at a site. Found out once for all steps that share their tensors."""
        runs: list[tuple[Bound, Site | None]] = []
        for p, w, route in work.writes.get(site, ()):
            if route.form == "mask" and site in work.shape.blank:
                run: Bound = partial(self._account_blank, work, p, w, route)
            else:
                run = self._bind(work, p, w, route)
            runs.append((run, None if route.read == site else route.read))
        gates = work.gates if work.gates is not None and site in work.gates.rows else None
        return Visit(tuple(runs), tuple(work.kept.get(site, ())), gates)

    def _bind(self, work: Launches, p: int, w: int, route: Route) -> Bound:
        """A route's operator with the bank, the knobs and the account of a frame."""
        own = self._bank.routes[route]
        knobs_T3R, measured_TR = work.knobs_TP3R[:, p], work.measured_TPR[:, p]
        if route.form == "law":  # knobs are as wide as the widest program, a route as its own laws
            own_R = slice(own["probe"].shape[1])
            knobs_T3R, measured_TR = knobs_T3R[:, :, own_R], measured_TR[:, own_R]
        setpoint_TR, strength_TR, cap_TR = knobs_T3R.unbind(1)
        account = [work.budget_T, work.spent_T, measured_TR, work.effort_WT[w], work.saturated_T]
        resident = [own[name] for name in RESIDENT[route.form]]
        knobs = [setpoint_TR, strength_TR, cap_TR] if route.form in ("law", "turn") else [strength_TR, cap_TR]
        arguments = (work.slot_PT[p], *resident, *knobs, *account)
        run = bind(OPERATORS[route.form], *arguments)
        is_last = route.form == "law" and work.writes[route.write][-1] == (p, w, route)
        return self._norms.fused(route.write, run, *arguments) if is_last else run

    def _account_blank(self, work: Launches, p: int, w: int, route: Route, *_: Tensor) -> None:
        """What the kernel would have measured of a mask that leaves nothing, had there been something: ρ = 1."""
        channel_T1 = self._bank.routes[route]["channel"][work.slot_PT[p].long()][:, :1]
        channel_T1 = channel_T1.clamp_min(0)  # that of a token without a program, which only fills a batch up
        work.measured_TPR[:, p].scatter_(1, channel_T1.long(), 1.0)
        work.effort_WT[w].add_(1.0)
        work.spent_T.add_(1.0)
