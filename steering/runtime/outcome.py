"""What a step gave, on the host, before any of it is committed."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace
from typing import NamedTuple, TypeVar

from steering.runtime.launches import Reading
from steering.runtime.request import TokenLogprob
from steering.runtime.sampler import Drawn
from steering.runtime.scheduler import Batch
from steering.runtime.scope import Frame

Value = TypeVar("Value")


class Divergence(NamedTuple):
    """How far a guarded request's token distribution is from its twin's, in nats, and whether the guard limited it."""

    kl: float
    is_limited: bool


class Outcome(NamedTuple):
    """A computed step, nothing of it committed yet.

    judged: log-probabilities of the prompt tokens that follow those of this step, where they were asked for.
    lost: the ids whose state is not finite. failed: what ended other requests while their tokens were drawn.
    """

    batch: Batch
    frame: Frame | None
    reading: Reading | None
    drawn: dict[str, Drawn]
    kl: dict[str, Divergence]
    lost: frozenset[str]
    judged: dict[str, list[TokenLogprob]]
    failed: dict[str, Exception]

    def within(self, batch: Batch) -> Outcome:
        """The part of those requests that are in `batch`, which is this one without the others' segments."""
        if batch is self.batch:
            return self
        names = {segment.sequence.request.id for segment in batch.segments}
        frame, reading = self.frame, self.reading
        if frame is not None and reading is not None:
            is_own = [spot.request_id in names for spot in frame.spots]
            frame = replace(
                frame,
                steered=tuple(each for each in frame.steered if each.request_id in names),
                spots=tuple(spot for spot, own in zip(frame.spots, is_own, strict=True) if own),
            )
            gates = tuple(each for each, own in zip(reading.gates, is_own, strict=True) if own)
            reading = replace(reading, gates=gates)
        return Outcome(
            batch,
            frame,
            reading,
            _of(self.drawn, names),
            _of(self.kl, names),
            self.lost & names,
            _of(self.judged, names),
            _of(self.failed, names),
        )


def _of(values: dict[str, Value], names: Container[str]) -> dict[str, Value]:
    return {name: value for name, value in values.items() if name in names}
