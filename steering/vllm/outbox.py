"""What a worker measured and nobody took yet. Bounded: what there is no room for is named, never silently missing."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping

import numpy as np

from steering.runtime.launches import Reading, write_sites
from steering.runtime.scheduler import Batch, Segment
from steering.runtime.scope import Frame, Spot, Steering
from steering.vllm.account import Answer, Parcel, Record

ROOM = 2**26
"""Bytes of measurements that are kept: some 10⁵ tokens of a program with 32 routes."""


class Outbox:
    """Records of steps, oldest first, and what else the front must know."""

    def __init__(self, room: int = ROOM) -> None:
        self._room = room
        self._records: deque[Record] = deque()
        self._size = 0
        self._lost: dict[str, int] = {}
        self._failed: dict[str, str] = {}
        self._dropped: Counter[str] = Counter()

    def fail(self, name: str, reason: str) -> None:
        """A request cannot be steered."""
        self._failed[name] = reason

    def lose(self, name: str, position: int) -> None:
        """A request's state is not finite from this position on."""
        self._lost.setdefault(name, position)

    def add(
        self,
        batch: Batch,
        frame: Frame,
        reading: Reading,
        steerings: Mapping[str, Steering],
        name_of: Callable[[str], str],
    ) -> None:
        """Keep what a step measured, request by request."""
        segments = {segment.sequence.request.id: segment for segment in batch.segments}
        answers: dict[str, list[Answer]] = {}
        for spot, z_K in zip(frame.spots, reading.gates, strict=True):
            if len(z_K) > spot.n_counted:
                answers.setdefault(spot.request_id, []).append(_answer(spot, z_K, segments[spot.request_id]))
        route_at = {route: p for p, route in enumerate(reading.routes)}
        site_at = {site: w for w, site in enumerate(reading.sites)}
        steered = {one.request_id: one for one in frame.steered}
        for request_id in dict.fromkeys((*steered, *answers)):
            knobs, segment = steerings[request_id].knobs, segments[request_id]
            if (one := steered.get(request_id)) is None:
                tokens_K, active_KR = np.zeros(0, dtype=np.int64), np.zeros((0, knobs.terms_NR.shape[1]), dtype=bool)
            else:
                tokens_K, active_KR = one.tokens_K, one.active_KR
            columns = [route_at[route] for route in knobs.routes]
            rows = [site_at[site] for site in write_sites(knobs.routes)]
            self._keep(
                Record(
                    name_of(request_id),
                    tokens_K - segment.offset + segment.start,
                    active_KR,
                    reading.measured_TPR[tokens_K][:, columns, : active_KR.shape[1]],
                    reading.effort_WT[rows][:, tokens_K],
                    reading.total_T[tokens_K],
                    reading.saturated_T[tokens_K],
                    tuple(answers.get(request_id, ())),
                )
            )

    def _keep(self, record: Record) -> None:
        self._records.append(record)
        self._size += _size(record)
        while self._size > self._room:
            oldest = self._records.popleft()
            self._size -= _size(oldest)
            self._dropped[oldest.name] += len(oldest.positions_K) or 1

    def take(self) -> bytes:
        """Everything, which is forgotten here."""
        if not (self._records or self._lost or self._failed or self._dropped):
            return b""
        parcel = Parcel(tuple(self._records), dict(self._lost), dict(self._failed), dict(self._dropped)).encode()
        for kept in (self._records, self._lost, self._failed, self._dropped):
            kept.clear()
        self._size = 0
        return parcel


def _answer(spot: Spot, z_K: np.ndarray, segment: Segment) -> Answer:
    """What a gate measured for the first time."""
    positions_K = spot.tokens_K - segment.offset + segment.start
    return Answer(spot.term, positions_K[spot.n_counted :], z_K[spot.n_counted :])


def _size(record: Record) -> int:
    return 64 + record.measured_KPR.nbytes + record.effort_WK.nbytes + record.active_KR.nbytes
