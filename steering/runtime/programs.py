"""Programs as the bank takes them: prepared on the thread of whoever submits them, kept while there is room.

What a slot holds depends on `Program.shape` alone. It is worked out once for each shape (60 µs a route: conversion to
float32, norms, trimming) and laid into one block of memory, page-locked beside a GPU, so that making a program resident
is one copy to the device that nobody waits for, and copies within it. Thousands of shapes stay known within a bound on
their bytes; what is over it is forgotten, least recently used first, and prepared again when it is asked for again.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from steering.program import Program
from steering.types import Route

HOST_BYTES = 2**31
"""Memory for prepared programs: two thousand of A-LQR on a model of 32 layers and width 4096, 1 MB each."""


Part = tuple[torch.Size, torch.dtype]
"""What a tensor in a block is: its shape and its dtype, which has four bytes."""


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """What a slot holds of a program: one block of memory, and what lies in it one after another, by route and name."""

    rank: int
    packed: Tensor
    parts: Mapping[Route, Mapping[str, Part]]

    @classmethod
    def of(cls, program: Program, *, is_pinned: bool = False) -> Prepared:
        """Work out and pack what a program has resident."""
        parts: dict[Route, dict[str, Part]] = {}
        rows: list[Tensor] = []
        for route, law in program.laws.items():
            parts[route] = {}
            for name, tensor in law.resident().items():
                parts[route][name] = (tensor.shape, tensor.dtype)
                rows.append(tensor.contiguous().view(torch.float32).flatten())
        packed = torch.cat(rows)
        if is_pinned:
            with suppress(RuntimeError):  # no more memory may be locked: the copy will wait, that is all
                packed = packed.pin_memory()
        return cls(program.rank, packed, parts)

    @property
    def n_bytes(self) -> int:
        """Its memory."""
        return self.packed.nbytes

    def tensors(self, device: torch.device) -> dict[Route, dict[str, Tensor]]:
        """The tensors by route and name, on a device: views of one block."""
        sizes = [math.prod(shape) for parts in self.parts.values() for shape, _ in parts.values()]
        flat = iter(self.packed.to(device, non_blocking=True).split(sizes))

        def shaped(shape: torch.Size, dtype: torch.dtype) -> Tensor:
            one = next(flat) if dtype == torch.float32 else next(flat).view(dtype)
            return one if len(shape) == 1 else one.view(shape)

        return {route: {name: shaped(*part) for name, part in parts.items()} for route, parts in self.parts.items()}


class Programs:
    """Prepared programs by `Program.shape`, from any thread."""

    def __init__(self, limit: int = HOST_BYTES, *, is_pinned: bool = False) -> None:
        self.n_bytes = 0
        self._limit = limit
        self._is_pinned = is_pinned
        self._lock = threading.Lock()
        self._known: OrderedDict[str, Prepared] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, program: Program) -> bool:
        return program.shape in self._known

    def of(self, program: Program) -> Prepared:
        """A program prepared, now or before."""
        shape = program.shape
        with self._lock:
            if (known := self._known.get(shape)) is not None:
                self._known.move_to_end(shape)
                return known
        made = Prepared.of(program, is_pinned=self._is_pinned)  # others need not wait; two may make the same
        with self._lock:
            if shape not in self._known and made.n_bytes <= self._limit:
                self._known[shape] = made
                self.n_bytes += made.n_bytes
            while self.n_bytes > self._limit:
                self.n_bytes -= self._known.popitem(last=False)[1].n_bytes
        return made
