"""Hooks in compiled models: two operators that the compiler does not look into.

    setpoint::whole_(state!, place)             a site's own tensor
    setpoint::pair_(hidden!, residual!, place)  one whose state is a sum

They name a place, not an object, since a compiled graph outlives the engine it was made for, and ask the controller
whose step runs on this thread; nobody's, in a warm-up. Under CUDA graphs they are `splitting_ops`: a graph ends before
them and the next begins behind them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from steering.vllm.sites import Act

OPERATORS = ("setpoint::whole_", "setpoint::pair_")
"""Their names, for `splitting_ops`."""

_local = threading.local()


@contextmanager
def acting(act: Act) -> Iterator[None]:
    """While a step of `act` runs on this thread."""
    before = getattr(_local, "act", None)
    _local.act = act
    try:
        yield
    finally:
        _local.act = before


@torch.library.custom_op("setpoint::whole_", mutates_args={"state"})
def whole_(state: Tensor, place: str) -> None:
    """`Act.whole` of the controller whose step runs."""
    act = getattr(_local, "act", None)
    if act is not None:
        act.whole(state, place)


@torch.library.custom_op("setpoint::pair_", mutates_args={"hidden", "residual"})
def pair_(hidden: Tensor, residual: Tensor, place: str) -> None:
    """`Act.pair` of the controller whose step runs."""
    act = getattr(_local, "act", None)
    if act is not None:
        act.pair(hidden, residual, place)


@whole_.register_fake
def _(state: Tensor, place: str) -> None:
    return None


@pair_.register_fake
def _(hidden: Tensor, residual: Tensor, place: str) -> None:
    return None


class Traced:
    """What the hooks of a compiled model call."""

    def wants(self, place: str) -> bool:
        """Always: a graph is the same in all steps."""
        return True

    def whole(self, state: Tensor, place: str) -> None:
        """The operator."""
        torch.ops.setpoint.whole_(state, place)

    def pair(self, hidden: Tensor, residual: Tensor, place: str) -> None:
        """The operator."""
        torch.ops.setpoint.pair_(hidden, residual, place)
