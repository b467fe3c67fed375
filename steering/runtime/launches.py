"""The device side of a frame: what the kernels read at each site, what they measured, and how that comes back.

A frame that comes once is put on the device as it is. Steps that look alike (`Shape`) may share tensors instead that
stay in their places, for more tokens than most of them have: what is over has slot 0 and is steered by nobody. Either
way all that is measured lies in one buffer, which is cleared before a step and comes back in one copy.

Legend: T tokens · P routes · R channels · W write sites · G rows of gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.binding import Bound
from steering.runtime.gates import GateTensors, rows_of
from steering.runtime.scope import Frame
from steering.runtime.transfer import upload
from steering.types import Route, Site


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
    total_T: np.ndarray
    top_T: np.ndarray
    gates: tuple[np.ndarray, ...] = ()


class Shape(NamedTuple):
    """All of a frame but its numbers: frames of one shape launch the same kernels at the same sites.

    blank, sparse: the sites of `steering.runtime.shortcuts`. room: rows of the gates of each site, which measure states
    of this width. eras: of which make the bank's tensors are, by route (`Tensors.era`), where that matters.
    """

    routes: tuple[Route, ...]
    rank: int
    blank: frozenset[Site]
    sparse: frozenset[Site]
    room: tuple[tuple[Site, int], ...] = ()
    width: int = 0
    eras: tuple[object, ...] = ()


class Account(NamedTuple):
    """What a step measured, on the device, and how to read it."""

    routes: tuple[Route, ...]
    sites: tuple[Site, ...]
    n_tokens: int
    sizes: tuple[int, ...]
    order: tuple[np.ndarray, ...]
    tensors: tuple[Tensor, ...]

    def reading(self, host: Sequence[Tensor]) -> Reading:
        """The measurements, of copies of `tensors` that nobody else changes; padding left out."""
        flat, n, T = host[0].numpy(), self.n_tokens, self.sizes[-1]  # numpy: a view takes it a fifth of torch's time
        measured_TPR = flat[: self.sizes[0]].reshape(T, len(self.routes), -1)[:n]
        effort_WT = flat[self.sizes[0] : -2 * T].reshape(len(self.sites), T)[:, :n]
        saturated_T = flat[-2 * T : -T].view(np.int32)[:n]
        gates = tuple(host[1].numpy()[rows] for rows in self.order)
        total_T, top_T = flat[-T:][:n].astype(np.float64), effort_WT.max(axis=0)
        return Reading(self.routes, self.sites, measured_TPR, effort_WT, saturated_T, total_T, top_T, gates)


class Visit(NamedTuple):
    """What a step does at one site: operators bound to all their arguments but the rows, each with the site that it
    reads (None: this one); the sites as which the state is kept; the gates that are asked."""

    runs: tuple[tuple[Bound, Site | None], ...]
    names: tuple[Site, ...]
    gates: GateTensors | None


@dataclass(frozen=True, slots=True)
class Launches:
    """Tensors for the kernels of a step, and what to do at each site.

    outputs: measured, effort, saturated and spent, which have these sizes, in one buffer.
    kept: where states are kept for laws that write elsewhere, and the sites as which they are read (`source`).
    visits: what is done at each site, from its first visit on.
    """

    shape: Shape
    slot_PT: Tensor
    knobs_TP3R: Tensor
    budget_T: Tensor
    spent_T: Tensor
    measured_TPR: Tensor
    effort_WT: Tensor
    saturated_T: Tensor
    outputs: Tensor
    sizes: tuple[int, ...]
    sites: tuple[Site, ...]
    writes: dict[Site, list[tuple[int, int, Route]]]
    kept: dict[Site, list[Site]]
    gates: GateTensors | None
    visits: dict[Site, Visit] = field(default_factory=dict)

    @classmethod
    def of(cls, frame: Frame, shape: Shape, device: torch.device) -> Launches:
        """The device side of this frame, and of none but it."""
        knobs_TP3R = upload(frame.knobs_TP3R, device)
        if frame.spots and device.type == "cpu":
            knobs_TP3R = knobs_TP3R.clone()  # gates change it, and the frame may come again
        made = cls._over(shape, upload(frame.slot_PT, device), knobs_TP3R, upload(frame.budget_T, device))
        if made.gates is not None:
            made.gates.load(frame, knobs_TP3R[:, :, 1])
        return made

    @classmethod
    def lasting(cls, shape: Shape, n_tokens: int, device: torch.device) -> Launches:
        """Tensors of a shape for up to `n_tokens` tokens, to be loaded with a frame."""
        n_routes = len(shape.routes)
        return cls._over(
            shape,
            torch.zeros(n_routes, n_tokens, dtype=torch.int32, device=device),
            torch.zeros(n_tokens, n_routes, 3, shape.rank, device=device),
            torch.zeros(n_tokens, device=device),
        )

    @classmethod
    def _over(cls, shape: Shape, slot_PT: Tensor, knobs_TP3R: Tensor, budget_T: Tensor) -> Launches:
        """With outputs for these inputs: views of one buffer, so that they come back in one copy."""
        (P, T), R, device = slot_PT.shape, shape.rank, slot_PT.device
        sites = write_sites(shape.routes)
        index = {site: w for w, site in enumerate(sites)}
        sizes = (T * P * R, len(sites) * T, T, T)
        outputs = torch.zeros(sum(sizes), device=device)
        measured, effort, saturated, spent_T = outputs.split(sizes)
        writes: dict[Site, list[tuple[int, int, Route]]] = {}
        for p, route in enumerate(shape.routes):
            writes.setdefault(route.write, []).append((p, index[route.write], route))
        kept: dict[Site, list[Site]] = {}
        for read in {route.read for route in shape.routes if route.read != route.write}:
            kept.setdefault(source(read, shape.routes), []).append(read)
        return cls(
            shape,
            slot_PT,
            knobs_TP3R,
            budget_T,
            spent_T,
            measured.view(T, P, R),
            effort.view(len(sites), T),
            saturated.view(torch.int32),
            outputs,
            sizes,
            sites,
            writes,
            kept,
            GateTensors.of(dict(shape.room), shape.width, knobs_TP3R[:, :, 1]) if shape.room else None,
        )

    def load(self, frame: Frame) -> None:
        """Take the numbers of a frame of this shape, which may have fewer tokens."""
        n, device = frame.slot_PT.shape[1], self.slot_PT.device
        self.slot_PT[:, :n].copy_(upload(frame.slot_PT, device))
        self.slot_PT[:, n:] = 0
        self.knobs_TP3R[:n].copy_(upload(frame.knobs_TP3R, device))
        self.budget_T[:n].copy_(upload(frame.budget_T, device))
        if self.gates is not None:
            self.gates.load(frame, self.knobs_TP3R[:, :, 1])

    def clear(self) -> None:
        """Make ready for a step."""
        self.outputs.zero_()
        if self.gates is not None:
            self.gates.shut_TPR.zero_()

    def account(self, frame: Frame) -> Account:
        """What the step of this frame measured. On a CPU a copy: the next step clears what was measured."""
        tensors: tuple[Tensor, ...] = (self.outputs,) if self.gates is None else (self.outputs, self.gates.measured_G)
        if self.outputs.is_cpu:
            tensors = tuple(tensor.clone() for tensor in tensors)
        order = () if self.gates is None else tuple(self.gates.order)
        return Account(self.shape.routes, self.sites, frame.slot_PT.shape[1], self.sizes, order, tensors)


def write_sites(routes: tuple[Route, ...]) -> tuple[Site, ...]:
    """The distinct write sites of some routes, in their order."""
    return tuple(dict.fromkeys(route.write for route in routes))


def source(read: Site, routes: tuple[Route, ...]) -> Site:
    """Where the state that some routes read at a site can be had: at the output of the block before, if it is a block's
    input and nobody writes it in between. That site is mostly looked at anyway, and each look costs a small batch."""
    if read.tap == "resid_pre" and read.layer and all(route.write != read for route in routes):
        return Site("resid_post", read.layer - 1)
    return read


def room_for(frame: Frame, *, spare: bool) -> tuple[tuple[Site, int], ...]:
    """Rows for the gates of a frame, by site; with some to spare, frames with a few more have the same shape."""
    rows = rows_of(frame)
    return tuple((site, 1 << (rows[site] - 1).bit_length() if spare else rows[site]) for site in sorted(rows))
