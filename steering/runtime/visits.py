"""What a step does at its sites: laws and edits run, gates are asked, states are kept for those that read them later.

Whoever runs a model gives the tap of each site its `visit`, sets `work` before a forward pass and calls `end` behind
it. Without work a visit costs an attribute look-up; with it, a site at which nothing is done a dictionary look-up.

What a law reads: a law that writes the site it reads sees what the model and the edits made there, before any other
route's control. A law that writes elsewhere sees its site as the model goes on with it, all controls there included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

from torch import Tensor

from kernels import bind, feedback_, mask_, sparsify_, turn_
from kernels.binding import Bound
from steering.runtime.bank import Bank
from steering.runtime.launches import Launches, Visit
from steering.types import Form, Route, Site

OPERATORS: Mapping[Form, Callable[..., None]] = {"law": feedback_, "mask": mask_, "turn": turn_, "sparse": sparsify_}
RESIDENT: Mapping[Form, tuple[str, ...]] = {
    "law": ("probe", "gain", "norm", "limit", "knee", "floor", "relative"),
    "mask": ("scale", "shift", "low", "high", "channel"),
    "turn": ("plane", "adaptive", "channel"),
    "sparse": ("weight", "threshold", "count", "rest", "channel"),
}
"""What each operator takes of the bank, in its order."""


class Fusing(Protocol):
    """Norms into whose launch the law before them may be taken (`steering.runtime.norms`)."""

    def fused(self, site: Site, run: Bound, *arguments: Tensor) -> Bound:
        """The last law that writes `site`: `run`, or one that waits for the norm behind it."""

    def flush(self) -> None:
        """Run the law that waits, if one does."""


class Apart:
    """Norms that have launches of their own: no law waits."""

    def fused(self, site: Site, run: Bound, *arguments: Tensor) -> Bound:
        """`run`."""
        return run

    def flush(self) -> None:
        """Nothing waits."""


class Visits:
    """The visits of one module tree. `work`: that of the step that runs, None between steps and without steering.

    states: those that were kept so far in this step, by the site as which they are read.
    """

    def __init__(self, bank: Bank, norms: Fusing) -> None:
        self.work: Launches | None = None
        self._bank = bank
        self._norms = norms
        self.states: dict[Site, Tensor] = {}

    def end(self) -> None:
        """End a forward pass, whichever way it ended."""
        self.work = None
        self.states.clear()

    def visit(self, site: Site) -> Callable[[Tensor], Tensor | None]:
        """The tap of a site: launch the laws that write it, keep it for those that read it later."""
        # What a module reads may be the residual itself (OLMo-2), which must not change with it.
        is_input = site.tap in ("attn_in", "mlp_in")

        def visit(state: Tensor) -> Tensor | None:
            work = self.work
            if work is None:
                return None
            if (todo := work.visits.get(site)) is None:
                todo = self.plan(work, site)
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
                run(rows_TD, rows_TD if read is None else self.states[read])
            for name in names:
                self.states[name] = rows_TD
            return None if changed is state else changed

        return visit

    def plan(self, work: Launches, site: Site) -> Visit:
        """What a step does at a site. Found out once for all steps that share their tensors."""
        runs: list[tuple[Bound, Site | None]] = []
        for p, w, route in work.writes.get(site, ()):
            if route.form == "mask" and site in work.shape.blank:
                run: Bound = partial(self._account_blank, work, p, w, route)
            else:
                run = self._bind(work, p, w, route)
            runs.append((run, None if route.read == site else route.read))
        gates = work.gates if work.gates is not None and site in work.gates.rows else None
        found = work.visits[site] = Visit(tuple(runs), tuple(work.kept.get(site, ())), gates)
        return found

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
