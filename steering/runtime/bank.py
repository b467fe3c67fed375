"""Programs resident on the device, at fixed addresses.

Row s of every tensor is slot s; row 0 is all zeros and belongs to unsteered tokens. A slot holds what a program's
`shape` fingerprints: probes, gains and limits. Setpoints, strengths and caps are knobs of each request, so that a
sweep over them shares one slot. One set of tensors per route:

    laws     probe_SRD   gain_SRE   norm_SR = ‖g‖   limit_SR   knee_SR   floor_SR   relative_SR
    edits    what `steering.edit` says of their form, and channel_SM: whose knobs each edit follows

R is a route's own number: as many channels as the widest law on it has. `Bank.rank` is that of the knobs, one number
for all routes, which doubles when a wider program arrives. Tensors are made anew when a route needs more than it had.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from steering.errors import BankFull
from steering.law import Law
from steering.program import Program
from steering.types import Route

IDLE: Mapping[str, float] = {"limit": float("inf"), "knee": float("-inf"), "floor": float("-inf"), "channel": -1}
"""What a tensor holds where no program has anything; 0 where it is not listed. An edit of channel −1 does not exist."""


class Tensors(dict[str, Tensor]):
    """What all slots hold on one route, by name; each (slots + 1, …)."""

    def holding(self, slots: int, one: Mapping[str, Tensor], device: torch.device) -> Tensors:
        """Tensors of `slots` + 1 rows that have room for `one` too: these if they have, else larger copies."""
        grown = Tensors()
        for name, tensor in one.items():
            old = self.get(name)
            shape = tensor.shape if old is None else tuple(map(max, old.shape[1:], tensor.shape))
            if old is not None and old.shape[1:] == shape:
                grown[name] = old
                continue
            grown[name] = torch.full((slots + 1, *shape), IDLE.get(name, 0.0), dtype=tensor.dtype, device=device)
            if old is not None:
                grown[name][tuple(slice(n) for n in old.shape)] = old
        return grown

    def put(self, slot: int, one: Mapping[str, Tensor]) -> None:
        """Fill a slot."""
        for name, tensor in one.items():
            self.clear_slot(slot, name)
            self[name][slot][tuple(slice(n) for n in tensor.shape)] = tensor

    def clear_slot(self, slot: int, name: str) -> None:
        """Make one tensor of a slot hold nothing."""
        self[name][slot] = IDLE.get(name, 0.0)


@dataclass(slots=True)
class _Slot:
    """Who holds a slot: running sequences by count, and the routes it fills."""

    index: int
    users: int
    routes: tuple[Route, ...]


class Bank:
    """Resident programs by `Program.shape`, counted by holders; those without one are evicted, oldest use first."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self.rank = 1
        self.routes: dict[Route, Tensors] = {}
        self._device = device
        self._held: OrderedDict[str, _Slot] = OrderedDict()
        self._free = list(range(slots, 0, -1))
        self._n_slots = slots

    def __len__(self) -> int:
        return len(self._held)

    def acquire(self, program: Program) -> int:
        """The slot of `program`, uploading it if it is not resident. 0 for a program that does nothing.

        Raises BankFull when every slot is held.
        """
        if not program.acts:
            return 0
        slot = self._held.get(program.shape)
        if slot is None:
            slot = self._fill(program)
        slot.users += 1
        self._held.move_to_end(program.shape)
        return slot.index

    def release(self, program: Program) -> None:
        """Give up one hold on a program; it stays resident until its slot is needed."""
        if program.acts:
            self._held[program.shape].users -= 1

    def _fill(self, program: Program) -> _Slot:
        if not self._free:
            self._evict()
        # All that may run out of memory comes first, and is kept only when it is whole: the neighbours' programs stay.
        routes = dict(self.routes)
        resident = {route: law.resident() for route, law in program.laws.items()}
        for route, one in resident.items():
            routes[route] = routes.get(route, Tensors()).holding(self._n_slots, one, self._device)
            resident[route] = {name: tensor.to(self._device) for name, tensor in one.items()}
        self.rank, self.routes = max(self.rank, 1 << (program.rank - 1).bit_length()), routes
        slot = _Slot(self._free.pop(), 0, tuple(program.laws))
        for route, one in resident.items():
            routes[route].put(slot.index, one)
        self._held[program.shape] = slot
        return slot

    def _evict(self) -> None:
        """Free the slot that has gone unused longest, and the tensors of routes that no other slot fills."""
        name = next((name for name, slot in self._held.items() if slot.users == 0), None)
        if name is None:
            raise BankFull(
                f"All {self._n_slots} program slots are held by running requests: try again, or raise program_slots."
            )
        gone = self._held.pop(name)
        kept = {route for slot in self._held.values() for route in slot.routes}
        for route in gone.routes:
            if route not in kept:
                del self.routes[route]
                continue
            for name in self.routes[route]:
                self.routes[route].clear_slot(gone.index, name)
        self._free.append(gone.index)


@dataclass(frozen=True, slots=True)
class Knobs:
    """A program's per-request numbers, on the host: setpoint, strength and cap of every route and channel.

    values_P3R: the three in this order; routes: the P of them; terms_NR: which channels each term owns; spending_R: the
    channels that have a strength on some route. The others steer no token. plain_P: the laws that nothing bounds or
    bends.
    """

    routes: tuple[Route, ...]
    values_P3R: np.ndarray
    terms_NR: np.ndarray
    spending_R: np.ndarray
    plain_P: np.ndarray
    budget: float

    @classmethod
    def of(cls, program: Program) -> Knobs:
        """The knobs of a program, in float32."""
        routes = tuple(program.laws)
        values = np.zeros((len(routes), 3, program.rank), dtype=np.float32)
        for p, law in enumerate(program.laws.values()):
            values[p] = law.knobs(program.rank).numpy()
        terms = np.zeros((len(program.terms), program.rank), dtype=bool)
        for mask, channels in zip(terms, program.channels, strict=True):
            mask[channels] = True
        is_free = program.guard.max_effort is None
        plain = np.array([is_free and isinstance(law, Law) and law.is_plain for law in program.laws.values()])
        return cls(routes, values, terms, (values[:, 1] != 0).any(axis=0), plain, program.guard.budget)
