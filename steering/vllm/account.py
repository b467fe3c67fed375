"""The account of steered requests on its way from the workers to the front, and the front's books of it.

A worker keeps a `Record` of each step and steered request; `setpoint_take` hands all over as `Parcel` and forgets them:

    4 bytes    length of the header
    header     JSON: protocol, sizes and gates of each record, who is lost, what could not be kept
    arrays     little-endian, record by record: positions, active channels, projections, efforts, …

The front files parcels in `Accounts` and settles each request up to the positions that it accepted: vLLM may run a step
further than that, whose measurements nobody shall see. What should have been measured and was not is counted there too,
from the program and the prompt alone, so that no receipt is silently short.

Legend: K steered tokens of a request in a step · P its routes, in the order of `Program.laws` · R channels ·
W its write sites.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from steering.errors import SteeringError
from steering.program import Program
from steering.runtime.bank import Knobs
from steering.runtime.launches import Reading, write_sites
from steering.runtime.receipt import Tally
from steering.runtime.request import LayerReading
from steering.runtime.scope import Spot, Steered, Steering, admitted
from steering.vllm.attachment import PROTOCOL


class Answer(NamedTuple):
    """What the gate of one term measured, at which positions."""

    term: int
    positions_K: np.ndarray
    projection_K: np.ndarray


class Record(NamedTuple):
    """What one step measured of one request. `answers`: of the gates that were asked for the first time."""

    name: str
    positions_K: np.ndarray
    active_KR: np.ndarray
    measured_KPR: np.ndarray
    effort_WK: np.ndarray
    total_K: np.ndarray
    saturated_K: np.ndarray
    answers: tuple[Answer, ...] = ()


class Parcel(NamedTuple):
    """All that a worker hands over at once.

    lost: the position from which on a request's state is not finite. failed: why a request could not be steered.
    dropped: positions whose measurements there was no room for.
    """

    records: tuple[Record, ...] = ()
    lost: Mapping[str, int] = {}
    failed: Mapping[str, str] = {}
    dropped: Mapping[str, int] = {}

    def encode(self) -> bytes:
        """As bytes."""
        arrays: list[bytes] = []
        heads = []
        for record in self.records:
            (K, P, R), W = record.measured_KPR.shape, len(record.effort_WK)
            heads.append(
                [record.name, K, P, R, W, [[answer.term, len(answer.positions_K)] for answer in record.answers]]
            )
            arrays += [
                record.positions_K.astype("<i4").tobytes(),
                record.active_KR.astype("u1").tobytes(),
                record.measured_KPR.astype("<f4").tobytes(),
                record.effort_WK.astype("<f4").tobytes(),
                record.total_K.astype("<f4").tobytes(),
                (record.saturated_K != 0).astype("u1").tobytes(),
            ]
            for answer in record.answers:
                arrays += [answer.positions_K.astype("<i4").tobytes(), answer.projection_K.astype("<f4").tobytes()]
        document = {
            "protocol": PROTOCOL,
            "records": heads,
            "lost": dict(self.lost),
            "failed": dict(self.failed),
            "dropped": dict(self.dropped),
        }
        header = json.dumps(document).encode()
        return b"".join([len(header).to_bytes(4, "little"), header, *arrays])

    @classmethod
    def decode(cls, data: bytes) -> Parcel:
        """What `encode` made. Raises SteeringError for anything else."""
        if not data:
            return cls()
        try:
            end = 4 + int.from_bytes(data[:4], "little")
            document = json.loads(data[4:end])
            if document["protocol"] != PROTOCOL:
                raise ValueError(document["protocol"])
            read = _Reader(data, end)
            records = tuple(_record(read, *head) for head in document["records"])
            if read.at != len(data):
                raise ValueError(read.at)
        except (ValueError, KeyError, TypeError) as error:
            raise SteeringError("What a worker measured did not arrive whole, or is of another version.") from error
        return cls(records, document["lost"], document["failed"], document["dropped"])


class _Reader:
    """Arrays out of a buffer, one behind the other."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data = data
        self.at = at

    def __call__(self, dtype: str, *shape: int) -> np.ndarray:
        n = int(np.prod(shape))
        array = np.frombuffer(self._data, dtype, n, self.at).reshape(shape)
        self.at += array.nbytes
        return array


def _record(read: _Reader, name: str, K: int, P: int, R: int, W: int, gates: list[tuple[int, int]]) -> Record:
    parts = (read("<i4", K), read("u1", K, R).astype(bool), read("<f4", K, P, R), read("<f4", W, K))
    more = (read("<f4", K), read("u1", K))
    return Record(name, *parts, *more, tuple(Answer(term, read("<i4", n), read("<f4", n)) for term, n in gates))


class Settled(NamedTuple):
    """What settling a request gave.

    trace: the readings at the last position, if they were asked for. is_lost: whether its state is not finite there.
    error: why it cannot go on otherwise; in one sentence.
    """

    trace: tuple[LayerReading, ...] = ()
    is_lost: bool = False
    error: str | None = None


NOTHING = Settled()
"""Nothing to say."""


@dataclass(slots=True, eq=False)
class _Open:
    """One running request: what is measured of it and not in its tally yet."""

    tally: Tally
    steering: Steering
    n_prompt: int
    settled: int = 0
    waiting: list[Record] = field(default_factory=list)
    lost: int | None = None
    error: str | None = None


class Accounts:
    """The front's books. Not for several threads at once."""

    def __init__(self) -> None:
        self._open: dict[str, _Open] = {}

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, name: str) -> bool:
        return name in self._open

    def open(self, name: str, program: Program, n_prompt: int, tally: Tally | None = None) -> Tally:
        """Begin a request whose program acts. What is measured goes to `tally`, or to a new one, which is returned."""
        tally = Tally(program) if tally is None else tally
        # Any slot but 0 does: which channels act where does not depend on it.
        self._open[name] = _Open(tally, Steering.of(program, 1, Knobs.of(program), n_prompt), n_prompt)
        return tally

    def close(self, name: str) -> None:
        """Forget a request; what is still measured of it is nobody's."""
        self._open.pop(name, None)

    def file(self, data: bytes) -> None:
        """Take what `setpoint_take` of rank 0 returned. Raises SteeringError if it is not whole."""
        parcel = Parcel.decode(data)
        for record in parcel.records:
            if (account := self._open.get(record.name)) is not None:
                account.waiting.append(record)
        for name, position in parcel.lost.items():
            if (account := self._open.get(name)) is not None:
                account.lost = position if account.lost is None else min(account.lost, position)
        for name, reason in parcel.failed.items():
            if (account := self._open.get(name)) is not None:
                account.error = reason
        for name, n_dropped in parcel.dropped.items():
            if (account := self._open.get(name)) is not None:
                account.error = f"The measurements of {n_dropped} tokens were dropped: nobody took them in time."

    def settle(self, name: str, end: int, *, trace: bool = False) -> Settled:
        """Bring a request's tally up to position `end`, exclusive: those that were run for the tokens accepted so far.

        With N accepted tokens that is n_prompt + N − 1. To be called before the N-th of them is given out.
        """
        account = self._open[name]
        if account.error is not None:
            return Settled(error=account.error)
        if account.lost is not None and account.lost < end:
            return Settled(is_lost=True)
        found: tuple[LayerReading, ...] = ()
        # The prompt first: its gates may decide what is expected of the steps behind it.
        for bound in dict.fromkeys((min(end, account.n_prompt), end)):
            if bound <= account.settled:
                continue
            part = self._settle(account, bound, trace and bound == end)
            if part.is_lost or part.error is not None:
                return part
            found, account.settled = part.trace, bound
        return Settled(found)

    def _settle(self, account: _Open, end: int, trace: bool) -> Settled:
        active_LR = account.steering.active(account.settled, end - account.settled)
        missing = set((np.flatnonzero(active_LR.any(axis=1)) + account.settled).tolist())
        found: tuple[LayerReading, ...] = ()
        waiting, account.waiting = account.waiting, []
        for record in waiting:
            part, rest = _split(record, end)
            if rest is not None:
                account.waiting.append(rest)
            if part is None:
                continue
            missing.difference_update(part.positions_K.tolist())
            readings = _add(account, part, end - 1 if trace else -1)
            if readings is None:
                return Settled(is_lost=True)
            found = readings or found
        if missing:
            return Settled(error=f"{len(missing)} tokens that should have been steered were not measured.")
        return Settled(found)


def _split(record: Record, end: int) -> tuple[Record | None, Record | None]:
    """The parts of a record before and from position `end` on."""
    last = max(int(positions[-1]) for positions in _positions(record) if len(positions))
    if last < end:
        return record, None
    first = min(int(positions[0]) for positions in _positions(record) if len(positions))
    if first >= end:
        return None, record
    is_in_K = record.positions_K < end
    return _part(record, is_in_K, end, is_before=True), _part(record, ~is_in_K, end, is_before=False)


def _positions(record: Record) -> Iterable[np.ndarray]:
    yield record.positions_K
    for answer in record.answers:
        yield answer.positions_K


def _part(record: Record, keep_K: np.ndarray, end: int, *, is_before: bool) -> Record:
    answers = []
    for answer in record.answers:
        own = (answer.positions_K < end) == is_before
        if own.any():
            answers.append(Answer(answer.term, answer.positions_K[own], answer.projection_K[own]))
    return Record(
        record.name,
        record.positions_K[keep_K],
        record.active_KR[keep_K],
        record.measured_KPR[keep_K],
        record.effort_WK[:, keep_K],
        record.total_K[keep_K],
        record.saturated_K[keep_K],
        tuple(answers),
    )


def _add(account: _Open, record: Record, traced: int) -> tuple[LayerReading, ...] | None:
    """Add a record to its tally. Returns the readings at position `traced` (−1: none), None for control not finite."""
    tally, knobs = account.tally, account.steering.knobs
    spots = []
    for term, positions_K, projection_K in record.answers:
        gate = account.steering.program.terms[term].gate
        if gate is None:
            continue
        tokens_K = np.searchsorted(record.positions_K, positions_K)
        spot = Spot(record.name, term, gate, tokens_K, knobs.terms_NR[term])
        # A gate may be asked where nothing acts: it rules no row of the record then.
        is_row = np.isin(positions_K, record.positions_K)
        spots.append((spot._replace(tokens_K=tokens_K[is_row]), projection_K[is_row]))
        tally.add_gate(spot, projection_K)
        if gate.when.on == "prompt":
            account.steering.decide(term, gate.is_open(float(projection_K[-1])))
    if not len(record.positions_K):
        return ()
    routes = knobs.routes
    total_K = record.total_K.astype(np.float64)
    top_K = record.effort_WK.max(axis=0)
    reading = Reading(
        routes, write_sites(routes), record.measured_KPR, record.effort_WK, record.saturated_K, total_K, top_K
    )
    steered = Steered(record.name, np.arange(len(record.positions_K)), record.active_KR)
    acted = admitted(steered, [spot for spot, _ in spots], [z_K for _, z_K in spots])
    if not tally.add(acted, reading):
        return None
    row = np.flatnonzero(record.positions_K == traced)  # none where nothing is traced
    return tally.trace(acted, reading, int(row[0])) if len(row) else ()
