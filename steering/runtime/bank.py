"""Programs resident on the device, at fixed addresses.

Row s of every tensor is slot s; row 0 is all zeros and belongs to unsteered tokens. A slot holds what a program's
`shape` fingerprints: probes, gains and limits. Setpoints, strengths and caps are knobs of each request, so that a
sweep over them shares one slot. One set of tensors per route:

    probe_SRD   gain_SRE   norm_SR = ‖g‖   limit_SR

R is one number for the whole bank and doubles when a wider program arrives; only then are the tensors made anew.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from steering.errors import BankFull
from steering.program import Program
from steering.types import Route


@dataclass(slots=True)
class LawTensors:
    """The laws of one route, of all slots."""

    probe_SRD: Tensor
    gain_SRE: Tensor
    norm_SR: Tensor
    limit_SR: Tensor

    @classmethod
    def zeros(cls, slots: int, rank: int, read: int, write: int, device: torch.device) -> LawTensors:
        """Laws that do nothing."""
        return cls(
            torch.zeros(slots, rank, read, device=device),
            torch.zeros(slots, rank, write, device=device),
            torch.zeros(slots, rank, device=device),
            torch.full((slots, rank), float("inf"), device=device),
        )

    def widened(self, rank: int) -> LawTensors:
        """The same laws with idle channels appended up to `rank`."""
        slots, old, read = self.probe_SRD.shape
        wide = LawTensors.zeros(slots, rank, read, self.gain_SRE.shape[2], self.probe_SRD.device)
        for name in self.__slots__:
            getattr(wide, name)[:, :old] = getattr(self, name)
        return wide


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
        self.routes: dict[Route, LawTensors] = {}
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
        rank, routes = self.rank, dict(self.routes)
        if program.rank > rank:
            rank = 1 << (program.rank - 1).bit_length()
            routes = {route: laws.widened(rank) for route, laws in routes.items()}
        for route, law in program.laws.items():
            if route not in routes:
                routes[route] = LawTensors.zeros(self._n_slots + 1, rank, *law.widths, self._device)
        resident = {route: law.to(torch.float32, self._device) for route, law in program.laws.items()}
        self.rank, self.routes = rank, routes
        slot = _Slot(self._free.pop(), 0, tuple(program.laws))
        for route, law in resident.items():
            tensors = routes[route]
            tensors.probe_SRD[slot.index, : law.rank] = law.probe
            tensors.gain_SRE[slot.index, : law.rank] = law.gain
            tensors.norm_SR[slot.index, : law.rank] = law.gain.norm(dim=-1)
            tensors.limit_SR[slot.index, : law.rank] = law.limit
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
            tensors = self.routes[route]
            for tensor in (tensors.probe_SRD, tensors.gain_SRE, tensors.norm_SR):
                tensor[gone.index] = 0
            tensors.limit_SR[gone.index] = float("inf")
        self._free.append(gone.index)


@dataclass(frozen=True, slots=True)
class Knobs:
    """A program's per-request numbers, on the host: setpoint, strength and cap of every route and channel.

    values_P3R: the three in this order; routes: the P of them; terms_NR: which channels each term owns.
    """

    routes: tuple[Route, ...]
    values_P3R: np.ndarray
    terms_NR: np.ndarray
    budget: float

    @classmethod
    def of(cls, program: Program) -> Knobs:
        """The knobs of a program, in float32."""
        routes = tuple(program.laws)
        values = np.zeros((len(routes), 3, program.rank), dtype=np.float32)
        for p, law in enumerate(program.laws.values()):
            for k, tensor in enumerate((law.setpoint, law.strength, law.cap)):
                values[p, k] = tensor.to(torch.float32).numpy()
        terms = np.zeros((len(program.terms), program.rank), dtype=bool)
        for mask, channels in zip(terms, program.channels, strict=True):
            mask[channels] = True
        return cls(routes, values, terms, program.guard.budget)
