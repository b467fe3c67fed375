"""Plan of `channels`: components of heads' outputs by which later heads read them, with their composition scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from steering.plan.base import Plan

Reader = Literal["query", "key", "value"]
"""Which input of a later head reads a channel."""
MAX_CHANNELS = 1024
"""Most channels of a plan."""
WIDEST = 2**20
"""Beyond the width of all heads of any block together."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ChannelsPlan(Plan):
    """n channels, the one furthest above chance first. One component may stand in several, with several readers.

    above: how many, from the first, lie above all random directions · heads H, head_width d · source_layer,
    source_head, component i (n,): component i of what that head writes · reader_layer, reader_head, reader (n,): the
    later head, and what of it reads · probe p (n, d) in the head's own space and direction v (n, D), unit rows, at the
    attention's output: the component is (a·p) v · sigma, share (n,) its singular value and that squared over the sum
    of the head's · score CS_i and null (n,) what a random direction scores in the root mean square · control_head,
    control_component, control_probe, control_direction: a random component of a random head of the same block for
    each channel.
    """

    kind: ClassVar[str] = "channels"

    above: int
    heads: int
    head_width: int
    source_layer: tuple[int, ...]
    source_head: tuple[int, ...]
    component: tuple[int, ...]
    reader_layer: tuple[int, ...]
    reader_head: tuple[int, ...]
    reader: tuple[str, ...]
    probe: Tensor
    direction: Tensor
    sigma: Tensor
    share: Tensor
    score: Tensor
    null: Tensor
    control_head: tuple[int, ...]
    control_component: tuple[int, ...]
    control_probe: Tensor
    control_direction: Tensor

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks whose attention writes channels, ascending."""
        return tuple(sorted(set(self.source_layer)))

    def _is_whole(self) -> bool:
        n, d = self.probe.shape
        heads = (*self.source_head, *self.reader_head, *self.control_head)
        components = (*self.component, *self.control_component)
        blocks = (*self.source_layer, *self.reader_layer)
        whole = (self.source_layer, self.source_head, self.component, self.reader_layer, self.reader_head, self.reader)
        return (
            0 < n <= MAX_CHANNELS
            and type(self.heads) is type(self.above) is int
            and 0 <= self.above <= n
            and type(self.head_width) is int
            and self.head_width == d
            and 0 < self.heads * d <= WIDEST
            and all(len(column) == n for column in (*whole, self.control_head, self.control_component))
            and all(type(head) is int and 0 <= head < self.heads for head in heads)
            and all(type(i) is int and 0 <= i < d for i in components)
            and all(type(layer) is int and 0 <= layer < self.depth for layer in blocks)
            and all(up < down for up, down in zip(self.source_layer, self.reader_layer, strict=True))
            and set(self.reader) <= set(get_args(Reader))
            and self.control_probe.shape == (n, d)
            and self.direction.shape == self.control_direction.shape == (n, self.width)
            and all(t.shape == (n,) and bool((t >= 0).all()) for t in (self.sigma, self.share, self.score, self.null))
            and all(bool(((t.norm(dim=-1) - 1).abs() <= 1e-3).all()) for t in (self.direction, self.control_direction))
        )
