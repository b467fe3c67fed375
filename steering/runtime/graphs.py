"""Decode steps as graphs: a forward pass recorded with all its launches, and replayed for every step that looks alike.

A step of single tokens does the same work whoever they belong to, but for what lies in its inputs. So the inputs have
fixed places on the device: ids, positions, places and tables for up to as many tokens as may run, and for each graph
the tensors of its frames (`Launches.lasting`). A step is copied there, filled up to one of a few sizes with tokens that
nobody asked for, and replayed. A token that fills up has slot 0, no keys to attend to, and writes its own to block 0
of the pool, which nobody reads.

There is a graph for each size and `Shape` of the frame, steered and unsteered apart: a batch without steering replays
launches of the model alone. One is made when its shape has come a few times, since making it costs some steps; the ones
used longest ago are dropped, and so are those whose tensors the bank has made anew. What is measured and the logits are
in place until the next replay, which comes behind all that reads them in stream order.

On a CPU, where nothing can be recorded, a replay runs the forward pass anew over the same fixed places. That saves
nothing: it is there so that all but the recording can be tested without a GPU.
Oracle: the step without a graph, token for token and measurement for measurement.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from steering.runtime.cache import BLOCK
from steering.runtime.launches import Launches, Shape
from steering.runtime.placement import Placement, layout_of, tables_of
from steering.runtime.scheduler import Batch
from steering.runtime.scope import Frame
from steering.runtime.transfer import upload

MOST = 64
"""Graphs that are kept."""
PATIENCE = 4
"""Steps of a shape before it gets a graph: recording takes about as long as this many steps save."""
WARM = 2
"""Forward passes before a recording, in which libraries allocate and kernels are compiled."""
_FEW = (1, 2, 3, 4)
"""Sizes below the first multiple of 8: none is filled up where sparse linear maps read what each token needs."""


class ShapeOf(Protocol):
    """The shape of a frame in a step of so many tokens."""

    def __call__(self, frame: Frame, n_tokens: int, *, is_lasting: bool) -> Shape:
        """As `Runner` has it."""


Run = Callable[[Placement, Launches | None, Tensor | None], Tensor]
"""(where the tokens lie, the frame's tensors, the tokens whose logits are wanted or None) → logits."""


class Key(NamedTuple):
    """What tells graphs apart."""

    size: int
    shape: Shape | None


class Graph(NamedTuple):
    """A recorded step: its tensors, and what runs it."""

    key: Key
    work: Launches | None
    replay: Callable[[], None]


def sizes(most: int) -> tuple[int, ...]:
    """The sizes of graphs for up to `most` tokens."""
    return (*(n for n in _FEW if n < most), *range(8, most, 8), most)


class Graphs:
    """The graphs of one engine, of up to `rows` tokens that attend to up to `blocks` blocks each.

    patience: steps of a shape before it gets a graph.
    """

    def __init__(self, rows: int, blocks: int, device: torch.device, *, patience: int | None = None) -> None:
        self._device = device
        self._patience = (PATIENCE if device.type == "cuda" else 0) if patience is None else patience
        self._sizes = sizes(rows)
        self._layout_3R = torch.zeros(3, rows, dtype=torch.int64, device=device)
        self._table_RM = torch.zeros(rows, blocks, dtype=torch.int32, device=device)
        self._length_R = torch.zeros(rows, dtype=torch.int32, device=device)
        self._logits_RV: Tensor | None = None
        self._graphs: OrderedDict[Key, Graph] = OrderedDict()
        self._steps: OrderedDict[Key, int] = OrderedDict()
        self._loaded: tuple[Frame, Graph] | None = None
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._is_refused = False

    def __len__(self) -> int:
        return len(self._graphs)

    def __call__(
        self, batch: Batch, frame: Frame | None, drawn_T: Tensor | None, shape_of: ShapeOf, run: Run
    ) -> tuple[Launches | None, Tensor] | None:
        """Run a step as a graph: the frame's tensors, and the logits (T, V) of all its tokens.

        None if it has none: a step that reads prompts, one of a shape that has not come often enough, or of one that
        cannot be recorded.
        """
        n = batch.n_tokens
        if batch.n_decode < len(batch.segments) or n > self._sizes[-1]:
            return None
        size = self._sizes[bisect_left(self._sizes, n)]
        graph = None
        if frame is None or self._loaded is None or self._loaded[0] is not frame or self._loaded[1].key.size != size:
            key = Key(size, None if frame is None else shape_of(frame, size, is_lasting=True))
            if (graph := self._graphs.get(key)) is not None:
                self._graphs.move_to_end(key)
            elif not self._is_due(key):
                return None
        else:
            key, graph = self._loaded[1].key, self._loaded[1]
        self._fill(batch, size, drawn_T)
        if graph is None and (graph := self._make(key, frame, run)) is None:
            return None
        if frame is not None and graph.work is not None and (self._loaded is None or self._loaded[0] is not frame):
            graph.work.load(frame)
            self._loaded = (frame, graph)
        graph.replay()
        assert self._logits_RV is not None
        return graph.work, self._logits_RV[:n]

    def _is_due(self, key: Key) -> bool:
        """Whether a shape has come often enough for a graph."""
        if self._is_refused:
            return False
        self._steps[key] = steps = self._steps.pop(key, 0) + 1
        if len(self._steps) > 16 * MOST:
            self._steps.popitem(last=False)
        return steps > self._patience

    def _fill(self, batch: Batch, size: int, drawn_T: Tensor | None) -> None:
        """Copy where a step's tokens lie to the fixed places, and 0 for those that fill up."""
        n, segments = batch.n_tokens, batch.segments
        tables = upload(tables_of(segments, BLOCK), self._device)
        layout_3N = upload(layout_of(segments, BLOCK, is_known=drawn_T is None), self._device)
        self._layout_3R[:, n:size] = 0
        self._layout_3R[:, :n].copy_(layout_3N)
        if drawn_T is not None:
            self._layout_3R[0, :n].copy_(drawn_T)
        self._length_R[n:size] = 0
        self._length_R[:n].copy_(tables[:, -1])
        self._table_RM[:n, : tables.shape[1] - 1].copy_(tables[:, :-1])  # what is behind a row's keys is not read

    def _make(self, key: Key, frame: Frame | None, run: Run) -> Graph | None:
        """Record the step that was filled in. None if that fails: no further graph is tried then."""
        try:
            work = None if key.shape is None else Launches.lasting(key.shape, key.size, self._device)
            if work is not None and frame is not None:
                work.load(frame)
            graph = Graph(key, work, self._recorded(key.size, work, run))
        except Exception as error:  # whatever a model does that cannot be recorded, it runs without
            self._is_refused = True
            logging.getLogger("setpoint").warning(
                "decode steps are not recorded as graphs: %s: %s", type(error).__name__, error
            )
            return None
        self._steps.pop(key, None)
        self._drop(key)
        self._graphs[key] = graph
        return graph

    def _recorded(self, size: int, work: Launches | None, run: Run) -> Callable[[], None]:
        """A replay of the forward pass over the fixed places, into the fixed logits."""
        place = Placement(
            self._layout_3R[0, :size],
            self._layout_3R[1, :size],
            self._layout_3R[2, :size],
            size,
            self._table_RM[:size],
            self._length_R[:size],
            (),
        )

        def forward() -> None:
            logits_NV = run(place, work, None)
            if self._logits_RV is None:
                self._logits_RV = logits_NV.new_empty(len(self._length_R), logits_NV.shape[1])
            self._logits_RV[:size].copy_(logits_NV)

        if self._device.type != "cuda":
            return forward
        here, aside = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(WARM):
                forward()
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Other threads go on to allocate and copy: only this one must not while it records.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            forward()
        return graph.replay

    def _drop(self, new: Key) -> None:
        """Make room for a graph, and forget those whose tensors the bank has since made anew."""
        eras = {} if new.shape is None else dict(zip(new.shape.routes, new.shape.eras, strict=True))
        for key in list(self._graphs):
            shape = key.shape
            if shape is not None and any(
                eras.get(route, era) is not era for route, era in zip(shape.routes, shape.eras, strict=True)
            ):
                del self._graphs[key]
        while len(self._graphs) >= MOST:
            self._graphs.popitem(last=False)
