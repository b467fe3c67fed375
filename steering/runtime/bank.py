"""Programs resident on the device, at fixed addresses.

Row s of every tensor is slot s; row 0 is all zeros and belongs to unsteered tokens. A slot holds what a program's
`shape` fingerprints: probes, gains and limits. Setpoints, strengths and caps are knobs of each request, so that a
sweep over them shares one slot. One set of tensors per route:

    laws     probe_SRD   gain_SRE   norm_SR = ‖g‖   limit_SR   knee_SR   floor_SR   relative_SR
    edits    what `steering.edit` says of their form, and channel_SM: whose knobs each edit follows

R is a route's own number: as many channels as the widest law on it has. `Bank.rank` is that of the knobs, one number
for all routes, which doubles when a wider program arrives. Tensors are made anew when a route needs more than it had:
more channels, or more rows, which follow the highest slot in use (a slot that is free is taken lowest first). So memory
is that of the programs that are there, not of `slots` times the widest.
"""

from __future__ import annotations

import heapq
import math
import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from steering.errors import BankFull, CapacityError
from steering.program import Program
from steering.runtime.cache import free_bytes
from steering.runtime.programs import Part, Prepared, Programs
from steering.types import Route

IDLE: Mapping[str, float] = {"limit": float("inf"), "knee": float("-inf"), "floor": float("-inf"), "channel": -1}
"""What a tensor holds where no program has anything; 0 where it is not listed. An edit of channel −1 does not exist."""
LEAST_ROWS = 8
"""Slots that a route's tensors have room for at first."""
SMALL = 2**20
"""Bytes that are taken without asking how many are free."""
SHARE = 0.8
"""Share of the free memory that programs may take: a step needs some of it too."""

Wanting = Mapping[Route, Mapping[str, tuple[int, ...]]]
"""Shapes of tensors that are to be made, by route and name."""


class Tensors(dict[str, Tensor]):
    """What all slots hold on one route, by name; each (rows, …), a row for every slot up to the highest in use.

    When one has to be larger all become an object of this class anew; `era` tells which, to those who keep addresses.
    """

    def __init__(self, tensors: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(tensors or {})
        self.era = object()

    def wanting(self, rows: int, one: Mapping[str, Part]) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors that have to be made anew to have `rows` rows with room for `one`."""
        found = {}
        for name, (shape, _) in one.items():
            old = self.get(name)
            if old is None:
                found[name] = (rows, *shape)
            elif len(old) < rows or old.shape[1:] != shape:
                new = tuple(map(max, old.shape, (rows, *shape)))
                if new != old.shape:
                    found[name] = new
        return found

    def grown(self, shapes: Mapping[str, tuple[int, ...]], one: Mapping[str, Part], device: torch.device) -> Tensors:
        """The same with larger copies of some: `shapes` is what was `wanting` for `one`."""
        grown = Tensors(self)
        for name, shape in shapes.items():
            grown[name] = torch.full(shape, IDLE.get(name, 0), dtype=one[name][1], device=device)
            if (old := self.get(name)) is not None:
                grown[name][tuple(slice(n) for n in old.shape)] = old
        return grown

    def places(self, slot: int, one: Mapping[str, Tensor]) -> list[Tensor]:
        """Where the tensors of one program belong."""
        return [self[name][slot][tuple(slice(n) for n in tensor.shape)] for name, tensor in one.items()]

    def clear_slot(self, slot: int) -> None:
        """Make a slot hold nothing."""
        for name, tensor in self.items():
            tensor[slot].fill_(IDLE.get(name, 0))


@dataclass(slots=True)
class _Slot:
    """Who holds a slot: running sequences by count, and the routes it fills."""

    index: int
    users: int
    routes: tuple[Route, ...]


class Bank:
    """Resident programs by `Program.shape`, counted by holders; those without one are evicted, oldest use first.

    `prepare` and `knobs` may be called from any thread, the rest from the engine's. A slot that is free holds nothing.
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        self.rank = 1
        self.routes: dict[Route, Tensors] = {}
        self.programs = Programs(is_pinned=device.type == "cuda")
        self._device = device
        self._held: OrderedDict[str, _Slot] = OrderedDict()
        self._fillers: Counter[Route] = Counter()
        self._free = list(range(1, slots + 1))
        self._n_slots = slots
        self._knobs: WeakKeyDictionary[Program, Knobs] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._held)

    def prepare(self, program: Program) -> None:
        """Do what can be done for a program before its turn comes, on the caller's thread."""
        if program.acts:
            self.programs.of(program)
            self.knobs(program)
            _ = program.fingerprint, program.blanks  # kept by the program

    def knobs(self, program: Program) -> Knobs:
        """The knobs of a program, kept as long as the program is."""
        with self._lock:
            known = self._knobs.get(program)
        if known is None:
            known = Knobs.of(program)
            with self._lock:
                self._knobs[program] = known
        return known

    def acquire(self, program: Program) -> int:
        """The slot of `program`, uploading it if it is not resident. 0 for a program that does nothing.

        Raises BankFull when every slot it could have is held, CapacityError when there is no memory for it.
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
        prepared = self.programs.of(program)
        if not self._free:
            self._evict()
        wanting = self._wanting(prepared, self._free[0])
        if _n_bytes(wanting) > SMALL:
            wanting = self._affordable(prepared, wanting)
        return self._put(program.shape, prepared, wanting)

    def _put(self, name: str, prepared: Prepared, wanting: Wanting) -> _Slot:
        """Fill the lowest free slot, for which the tensors of `wanting` have to be made."""
        # All that may run out of memory comes first, and is kept only when it is whole: the neighbours' programs stay.
        routes = dict(self.routes)
        for route, shapes in wanting.items():
            routes[route] = routes.get(route, Tensors()).grown(shapes, prepared.parts[route], self._device)
        resident = prepared.tensors(self._device)
        self.rank, self.routes = max(self.rank, 1 << (prepared.rank - 1).bit_length()), routes
        slot = _Slot(heapq.heappop(self._free), 0, tuple(prepared.parts))
        places = [place for route, one in resident.items() for place in routes[route].places(slot.index, one)]
        torch._foreach_copy_(places, [tensor for one in resident.values() for tensor in one.values()])
        self._held[name] = slot
        self._fillers.update(slot.routes)
        return slot

    def _rows(self, slot: int) -> int:
        """Rows of a tensor in which `slot` is the highest: few at first, then twice as many each time."""
        return 1 + min(self._n_slots, max(LEAST_ROWS, 1 << (slot - 1).bit_length()))

    def _evict(self) -> None:
        """Free the slot that has gone unused longest, and the tensors of routes that no other slot fills."""
        name = next((name for name, slot in self._held.items() if slot.users == 0), None)
        if name is None:
            raise BankFull(
                f"All {self._n_slots} program slots are held by running requests: try again, or raise program_slots."
            )
        self._drop(name)

    def _drop(self, name: str) -> None:
        """Free the slot of this name."""
        gone = self._held.pop(name)
        self._fillers.subtract(gone.routes)
        for route in gone.routes:
            if self._fillers[route]:
                self.routes[route].clear_slot(gone.index)
            else:
                del self._fillers[route]
                del self.routes[route]
        heapq.heappush(self._free, gone.index)

    def _wanting(self, prepared: Prepared, slot: int) -> Wanting:
        """The tensors that have to be made for a program to have this slot."""
        rows, nothing = self._rows(slot), Tensors()
        found = {route: self.routes.get(route, nothing).wanting(rows, parts) for route, parts in prepared.parts.items()}
        return {route: shapes for route, shapes in found.items() if shapes}

    def _affordable(self, prepared: Prepared, wanting: Wanting) -> Wanting:
        """What has to be made, with enough memory for it: at the price of programs that nobody uses, if need be."""
        if _n_bytes(wanting) > SHARE * spare_bytes(self._device):
            while any(slot.users == 0 for slot in self._held.values()):
                self._evict()
            wanting = self._wanting(prepared, self._free[0])
        needed, free = _n_bytes(wanting), spare_bytes(self._device)
        if needed <= SHARE * free:
            return wanting
        told = f"A program needs {needed / 1e6:.1f} MB on the device and {free / 1e6:.1f} MB are free"
        if not all(self._wanting(prepared, slot.index) for slot in self._held.values()):
            raise BankFull(f"{told}, and every slot that has room for it is held by running requests: try again.")
        raise CapacityError(
            f"{told}: try again, ask for fewer interventions, or lower program_slots, max_batch or kv_tokens.",
            param="steering",
        )


def _n_bytes(wanting: Wanting) -> int:
    """Memory of tensors that are to be made."""
    return sum(4 * math.prod(shape) for shapes in wanting.values() for shape in shapes.values())


def spare_bytes(device: torch.device) -> int:
    """Memory that new tensors may take: what is free, and what torch holds and does not use."""
    if device.type != "cuda":
        return free_bytes(device)
    return free_bytes(device) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


@dataclass(frozen=True, slots=True)
class Knobs:
    """A program's per-request numbers, on the host: setpoint, strength and cap of every route and channel.

    values_P3R: the three in this order; routes: the P of them; terms_NR: which channels each term owns; spending_R: the
    channels that have a strength on some route. The others steer no token.
    """

    routes: tuple[Route, ...]
    values_P3R: np.ndarray
    terms_NR: np.ndarray
    spending_R: np.ndarray
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
        return cls(routes, values, terms, (values[:, 1] != 0).any(axis=0), program.guard.budget)
