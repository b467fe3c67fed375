"""One step on the device: a packed batch and its frame in, logits and measurements out.

All tokens of a step, whoever they belong to, run as one sequence (1, T) through unmodified modelling code; rows and
masks are the attention's business, steering is that of the taps. A tap is installed when a program first needs its
site and costs a dictionary look-up from then on; a batch without steering launches nothing.

What a law reads: a law that writes the site it reads sees what the model and the edits made there, before any other
route's control. A law that writes elsewhere sees its site as the model goes on with it, all controls there included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from kernels import feedback_, mask_, plain_feedback_, sparsify_, turn_
from steering.plant.plant import Plant
from steering.runtime.attention import Placement, RowAttention
from steering.runtime.bank import Bank, Tensors
from steering.runtime.gates import GateTensors
from steering.runtime.scheduler import Batch, Segment
from steering.runtime.scope import Frame
from steering.runtime.shortcuts import Shortcuts
from steering.types import Form, Route, Site

OPERATORS: Mapping[Form, Callable[..., None]] = {"law": feedback_, "mask": mask_, "turn": turn_, "sparse": sparsify_}
RESIDENT: Mapping[Form, tuple[str, ...]] = {
    "law": ("probe", "gain", "norm", "limit", "knee", "floor", "relative"),
    "mask": ("scale", "shift", "low", "high", "channel"),
    "turn": ("plane", "adaptive", "channel"),
    "sparse": ("weight", "threshold", "count", "rest", "channel"),
}
"""What each operator takes of the bank, in its order."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What the kernels measured in one step, on the host.

    routes, sites: the P routes and W write sites; measured_TPR the projections c·x; effort_WT = ‖u‖/‖x‖ by write site;
    saturated_T nonzero where a limit, cap or budget bit. total_T, top_T: sum and maximum of the efforts of each token.
    gates: what each of the frame's spots measured, c·x at its tokens.
    """

    routes: tuple[Route, ...]
    sites: tuple[Site, ...]
    measured_TPR: np.ndarray
    effort_WT: np.ndarray
    saturated_T: np.ndarray
    total_T: list[float]
    top_T: list[float]
    gates: tuple[np.ndarray, ...] = ()


class Output(NamedTuple):
    """Logits of the segments that draw a token, in their order, and the step's measurements if it was steered.

    judged_JV: the logits of the `judged` segments' positions, one after another; no rows if nobody asked.
    """

    sampled: tuple[Segment, ...]
    logits_BV: Tensor
    judged: tuple[Segment, ...]
    judged_JV: Tensor
    reading: Reading | None


@dataclass(frozen=True, slots=True)
class _Launches:
    """The device side of a frame: tensors for the kernels, and what to do at each site."""

    slot_PT: Tensor
    knobs_TP3R: Tensor
    budget_T: Tensor
    spent_T: Tensor
    measured_TPR: Tensor
    effort_WT: Tensor
    saturated_T: Tensor
    outputs: Tensor
    sites: tuple[Site, ...]
    writes: dict[Site, list[tuple[int, int, Route]]]
    reads: frozenset[Site]
    blank: frozenset[Site]
    sparse: frozenset[Site]
    plain_P: tuple[bool, ...]
    gates: GateTensors | None = None
    rows: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Probes and gains of the tokens themselves, of the routes that are plain, gathered at their first launch."""


class Runner:
    """Owns the engine's module tree and its taps."""

    def __init__(self, plant: Plant, shell: nn.Module, attention: RowAttention, bank: Bank, row_length: int) -> None:
        self._plant = plant
        self._shell = shell
        self._attention = attention
        self._bank = bank
        self._row_length = row_length
        self._device = plant.device
        self._tapped: set[Site] = set()
        self._shortcuts = Shortcuts(plant, shell)
        self._launches: _Launches | None = None
        self._prepared: tuple[Frame, _Launches] | None = None
        self._states: dict[Site, Tensor] = {}

    @torch.inference_mode()
    def __call__(self, batch: Batch, frame: Frame | None) -> Output:
        """Run a step. Keys and values of its tokens are in the cache afterwards; running it twice changes nothing."""
        sampled = tuple(segment for segment in batch.segments if segment.samples)
        judged = tuple(segment for segment in batch.segments if segment.judged)
        keep = [segment.end for segment in sampled]
        keep += [s.offset + position - s.start for s in judged for position in s.judged]
        ids_3T = torch.from_numpy(self._layout(batch)).to(self._device, non_blocking=True)
        self._attention.place = Placement.of(batch, ids_3T[2], self._device)
        self._launches = work = None if frame is None else self._renew(frame, batch.n_tokens)
        if work is not None:
            self._shortcuts.blank, self._shortcuts.sparse = work.blank, work.sparse
        try:
            logits_KV = self._shell(
                input_ids=ids_3T[:1],
                position_ids=ids_3T[1:2],
                use_cache=False,
                logits_to_keep=torch.tensor(keep, dtype=torch.int64, device=self._device),
            ).logits[0]
            reading = None if frame is None else self._collect(frame)
        finally:
            self._launches = None
            self._shortcuts.blank = self._shortcuts.sparse = frozenset()
            self._states.clear()
        return Output(sampled, logits_KV[: len(sampled)], judged, logits_KV[len(sampled) :], reading)

    def _layout(self, batch: Batch) -> np.ndarray:
        """int64 (3, T): token ids, positions, and places in the cache."""
        layout = np.empty((3, batch.n_tokens), dtype=np.int64)
        for sequence, row, start, length, offset, _ in batch.segments:
            if length == 1:
                layout[:, offset] = (sequence.tokens[start], start, row * self._row_length + start)
                continue
            at = slice(offset, offset + length)
            layout[0, at] = sequence.tokens[start : start + length]
            layout[1, at] = np.arange(start, start + length)
            layout[2, at] = layout[1, at] + row * self._row_length
        return layout

    def _renew(self, frame: Frame, n_tokens: int) -> _Launches:
        """The device side of a frame, with cleared outputs; that of the step before if the frame is the same."""
        if self._prepared is None or self._prepared[0] is not frame:
            self._prepared = (frame, self._prepare(frame, n_tokens))
        else:
            self._prepared[1].outputs.zero_()
            self._prepared[1].spent_T.zero_()
            if (gates := self._prepared[1].gates) is not None:
                gates.shut_TPR.zero_()
        return self._prepared[1]

    def _prepare(self, frame: Frame, n_tokens: int) -> _Launches:
        """Put a frame on the device. Outputs are views of one buffer, so that they come back in one copy."""
        n_routes, rank = len(frame.routes), frame.knobs_TP3R.shape[3]
        sites = write_sites(frame.routes)
        index = {site: w for w, site in enumerate(sites)}
        sizes = (n_tokens * n_routes * rank, len(sites) * n_tokens, n_tokens)
        outputs = torch.zeros(sum(sizes), device=self._device)
        measured, effort, saturated = outputs.split(sizes)
        writes: dict[Site, list[tuple[int, int, Route]]] = {}
        for p, route in enumerate(frame.routes):
            writes.setdefault(route.write, []).append((p, index[route.write], route))
        reads = frozenset(route.read for route in frame.routes if route.read != route.write)
        for site in reads | writes.keys() | {spot.gate.site for spot in frame.spots}:
            self._tap(site)
        sparse = frozenset(
            route.write for p, route in enumerate(frame.routes) if route.form == "sparse" and frame.slot_PT[p].all()
        )
        knobs_TP3R = torch.from_numpy(frame.knobs_TP3R).to(self._device, non_blocking=True)
        if frame.spots and knobs_TP3R.device.type == "cpu":
            knobs_TP3R = knobs_TP3R.clone()  # gates change it, and the frame may come again
        return _Launches(
            torch.from_numpy(frame.slot_PT).to(self._device, non_blocking=True),
            knobs_TP3R,
            torch.from_numpy(frame.budget_T).to(self._device, non_blocking=True),
            torch.zeros(n_tokens, device=self._device),
            measured.view(n_tokens, n_routes, rank),
            effort.view(len(sites), n_tokens),
            saturated.view(torch.int32),
            outputs,
            sites,
            writes,
            reads,
            self._shortcuts.blankable(frame.blanks, frame.routes),
            self._shortcuts.sparsifiable(sparse, n_tokens),
            frame.plain_P,
            GateTensors.of(frame, knobs_TP3R[:, :, 1], self._device) if frame.spots else None,
        )

    def _collect(self, frame: Frame) -> Reading:
        """The measurements of the step, on the host."""
        launches = self._launches
        assert launches is not None
        host = launches.outputs.clone() if self._device.type == "cpu" else launches.outputs.cpu()
        measured, effort, saturated = host.split(
            (launches.measured_TPR.numel(), launches.effort_WT.numel(), launches.saturated_T.numel())
        )
        effort_WT = effort.view(launches.effort_WT.shape).numpy()
        gates: tuple[np.ndarray, ...] = ()
        if launches.gates is not None:
            measured_G = launches.gates.measured_G.cpu().numpy().copy()
            gates = tuple(measured_G[rows] for rows in launches.gates.order)
        return Reading(
            frame.routes,
            launches.sites,
            measured.view(launches.measured_TPR.shape).numpy(),
            effort_WT,
            saturated.view(torch.int32).numpy(),
            effort_WT.sum(axis=0).tolist(),
            effort_WT.max(axis=0).tolist(),
            gates,
        )

    def _tap(self, site: Site) -> None:
        if site not in self._tapped:
            self._plant.tap(self._shell, site, self._visit(site))
            self._tapped.add(site)

    def _visit(self, site: Site) -> Callable[[Tensor], Tensor | None]:
        """The tap of a site: launch the laws that write it, keep it for those that read it later."""

        def visit(state: Tensor) -> Tensor | None:
            work = self._launches
            if work is None:
                return None
            if work.gates is not None and site in work.gates.rows:
                work.gates.measure(site, state[0], work.knobs_TP3R[:, :, 1])
            launches = work.writes.get(site, ())
            # What a module reads may be the residual itself (OLMo-2), which must not change with it.
            changed = state.clone() if launches and site.tap in ("attn_in", "mlp_in") else state
            rows_TD = changed[0]
            for p, w, route in launches:
                if route.form == "mask" and site in work.blank:
                    self._account_blank(work, p, w, route)
                    continue
                read_TD = rows_TD if route.read == site else self._states[route.read]
                self._launch(work, p, w, rows_TD, read_TD, route)
            if site in work.reads:
                self._states[site] = rows_TD
            return None if changed is state else changed

        return visit

    def _launch(self, work: _Launches, p: int, w: int, y_TE: Tensor, x_TD: Tensor, route: Route) -> None:
        own = self._bank.routes[route]
        if work.plain_P[p] and y_TE.device.type == "cpu":
            self._launch_plain(work, p, w, y_TE, x_TD, own)
            return
        knobs_T3R, measured_TR = work.knobs_TP3R[:, p], work.measured_TPR[:, p]
        if route.form == "law":  # knobs are as wide as the widest program, a route as its own laws
            own_R = slice(own["probe"].shape[1])
            knobs_T3R, measured_TR = knobs_T3R[:, :, own_R], measured_TR[:, own_R]
        setpoint_TR, strength_TR, cap_TR = knobs_T3R.unbind(1)
        account = [work.budget_T, work.spent_T, measured_TR, work.effort_WT[w], work.saturated_T]
        resident = [own[name] for name in RESIDENT[route.form]]
        knobs = [setpoint_TR, strength_TR, cap_TR] if route.form in ("law", "turn") else [strength_TR, cap_TR]
        read = [x_TD] if route.form == "law" else []
        OPERATORS[route.form](y_TE, *read, work.slot_PT[p], *resident, *knobs, *account)

    def _launch_plain(self, work: _Launches, p: int, w: int, y_TE: Tensor, x_TD: Tensor, own: Tensors) -> None:
        """The same as `feedback_` in fewer operations: on a CPU each costs a small batch more than its work."""
        if p not in work.rows:
            slot_T = work.slot_PT[p]
            work.rows[p] = own["probe"].index_select(0, slot_T), own["gain"].index_select(0, slot_T)
        own_R = slice(own["probe"].shape[1])
        knobs_T3R = work.knobs_TP3R[:, p, :, own_R]
        account = (work.measured_TPR[:, p, own_R], work.effort_WT[w])
        plain_feedback_(y_TE, x_TD, *work.rows[p], knobs_T3R[:, 0], knobs_T3R[:, 1], *account)

    def _account_blank(self, work: _Launches, p: int, w: int, route: Route) -> None:
        """What the kernel would have measured of a mask that leaves nothing, had there been something: ρ = 1."""
        channel_T1 = self._bank.routes[route]["channel"][work.slot_PT[p].long()][:, :1]
        work.measured_TPR[:, p].scatter_(1, channel_T1.long(), 1.0)
        work.effort_WT[w].add_(1.0)
        work.spent_T.add_(1.0)


def write_sites(routes: tuple[Route, ...]) -> tuple[Site, ...]:
    """The distinct write sites of some routes, in their order."""
    return tuple(dict.fromkeys(route.write for route in routes))
