"""Who is steered where: scopes become slot numbers and strengths, in one numpy pass per step. No torch here.

A scope is a mask over a program's channels that depends on the token: its position in the prompt, counted over the
whole prompt whatever the chunks, or its decode step. A channel out of scope gets strength 0, a token without any
channel gets slot 0, and a program that does nothing has slot 0 throughout: kernels know nothing of scope.

A conditioned term has a gate (`steering.condition`). One that is asked at every token is decided on the device, within
the step; one that is asked at the prompt's last token is decided there for this token, and here from the next step on.

Legend: T tokens of the packed batch · P routes of the step · R channels of the bank · N terms of a program.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from steering.condition import Gate
from steering.program import Program
from steering.runtime.scheduler import Batch, Segment
from steering.types import Form, Route, Site

if TYPE_CHECKING:
    from steering.runtime.bank import Knobs


class Steered(NamedTuple):
    """What a step does to the tokens of one segment: which tokens (rows of the packed batch) and which channels."""

    request_id: str
    tokens_K: np.ndarray
    active_KR: np.ndarray


class Spot(NamedTuple):
    """A gate that is measured in a step: at which tokens (rows of the packed batch), and the channels it rules."""

    request_id: str
    term: int
    gate: Gate
    tokens_K: np.ndarray
    channels_R: np.ndarray
    n_counted: int = 0
    """How many of the tokens, the first ones, were asked before their request was interrupted."""


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """The steering of one step.

    routes            the P routes in use, fixed order
    slot_PT           int32 bank row of each token on each route; 0 = none
    knobs_TP3R        float32 setpoint, strength, cap
    budget_T          float32 allowed sum of efforts
    steered           one entry per steered segment, with the tokens whose measurements are not in a receipt yet
    spots             the gates measured in this step
    blanks            the sites of which every token of the step keeps nothing
    """

    routes: tuple[Route, ...]
    slot_PT: np.ndarray
    knobs_TP3R: np.ndarray
    budget_T: np.ndarray
    steered: tuple[Steered, ...]
    spots: tuple[Spot, ...] = ()
    blanks: frozenset[Site] = frozenset()


@dataclass(slots=True, eq=False)
class Steering:
    """One running sequence's steering: its slot, its knobs, and which channels act at which prompt position.

    prompt_IR: boolean over prompt positions. always_R: the channels of decode steps, None if they depend on the step.
    """

    program: Program
    slot: int
    knobs: Knobs
    prompt_IR: np.ndarray
    always_R: np.ndarray | None = None
    _is_open: dict[int, bool] = field(default_factory=dict)

    @classmethod
    def of(cls, program: Program, slot: int, knobs: Knobs, n_prompt: int) -> Steering:
        """The steering of a sequence whose prompt has `n_prompt` tokens."""
        prompt = np.zeros((n_prompt, program.rank), dtype=bool)
        for term, channels in zip(program.terms, program.channels, strict=True):
            scopes = term.scopes or (term.scope,)
            mask_IR = np.stack([scope.prompt_mask(n_prompt) for scope in scopes], axis=1)
            if term.gate is not None and term.gate.when.on == "prompt":
                # Not decided before the last token, nor there for laws that all write before the gate.
                mask_IR[: -1 if term.is_in_time else None] = False
            prompt[:, channels] = mask_IR
        steering = cls(program, slot, knobs, prompt & knobs.spending_R)
        steering._settle()
        return steering

    def active(self, start: int, length: int) -> np.ndarray:
        """Boolean (length, R): the channels in scope at positions start … start + length − 1 of the sequence."""
        n_prompt = len(self.prompt_IR)
        if start + length <= n_prompt:
            return self.prompt_IR[start : start + length]
        decode = [self._at_step(position - n_prompt) for position in range(max(start, n_prompt), start + length)]
        return np.concatenate([self.prompt_IR[start:n_prompt], np.stack(decode)])

    def spots(self, segment: Segment, active_LR: np.ndarray) -> list[Spot]:
        """The gates that are measured in a segment whose channels in scope are `active_LR`."""
        found = []
        last, n_past = len(self.prompt_IR) - 1 - segment.start, segment.sequence.counted - segment.start
        for n, term in enumerate(self.program.terms):
            if term.gate is None:
                continue
            if term.gate.when.on == "token":
                tokens = np.flatnonzero(active_LR[:, self.knobs.terms_NR[n]].any(axis=1))
            else:
                tokens = np.array([last] if 0 <= last < segment.length else [], dtype=np.int64)
            if len(tokens):
                name = segment.sequence.request.id
                n_counted = int((tokens < n_past).sum())
                found.append(Spot(name, n, term.gate, tokens + segment.offset, self.knobs.terms_NR[n], n_counted))
        return found

    def decide(self, term: int, is_open: bool) -> None:
        """Take the answer of a gate that was asked at the prompt's last token."""
        self._is_open[term] = is_open
        self._settle()

    def _settle(self) -> None:
        self.always_R = None
        scopes = (scope for term in self.program.terms for scope in term.scopes or (term.scope,))
        if all(isinstance(scope.generation, str) for scope in scopes):
            self.always_R = self._at_step(0)

    def _at_step(self, step: int) -> np.ndarray:
        if self.always_R is not None:
            return self.always_R
        acts_R = np.zeros(self.program.rank, dtype=bool)
        for n, (term, channels) in enumerate(zip(self.program.terms, self.program.channels, strict=True)):
            if term.gate is None or term.gate.when.on == "token" or self._is_open.get(n, False):
                acts_R[channels] = [scope.steers_step(step) for scope in term.scopes] or term.scope.steers_step(step)
        return acts_R & self.knobs.spending_R


class Resolver:
    """Frames of successive steps. While the same sequences decode, and no scope asks for the step's number, the frame
    of a step is that of the step before, the very object: half a millisecond a step at 16 requests."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] | None = None
        self._frame: Frame | None = None

    def __call__(self, batch: Batch, steerings: Mapping[str, Steering], rank: int) -> Frame | None:
        """The frame of a step; None when no token of it is steered. `rank` is the bank's R."""
        key = _steady_key(batch, steerings, rank)
        if key is None:
            return resolve(batch, steerings, rank)
        if key != self._key:
            self._key, self._frame = key, resolve(batch, steerings, rank)
        return self._frame


def _steady_key(batch: Batch, steerings: Mapping[str, Steering], rank: int) -> tuple[object, ...] | None:
    """What the frame of a pure decode step depends on: who is where. None if it depends on more."""
    if batch.n_decode < len(batch.segments):
        return None
    members: list[object] = [rank]
    for segment in batch.segments:
        name = segment.sequence.request.id
        if (steering := steerings.get(name)) is not None:
            if steering.always_R is None or segment.start < max(segment.sequence.n_prompt, segment.sequence.counted):
                return None  # one token of a prompt, or one that is read again and measured before
            members.append(steering)
        members.append((name, segment.is_shadow))
    return tuple(members)


def resolve(batch: Batch, steerings: Mapping[str, Steering], rank: int) -> Frame | None:
    """The frame of any step, from scratch."""
    found = []
    counted: list[Steered] = []
    blanks: list[frozenset[Site]] = []
    for segment in batch.segments:
        steering = steerings.get(segment.sequence.request.id)
        if steering is None or segment.is_shadow or not steering.slot:
            blanks.append(frozenset())
            continue
        blanks.append(steering.program.blanks)
        active_LR = steering.active(segment.start, segment.length)
        tokens_K = np.flatnonzero(active_LR.any(axis=1))
        spots = steering.spots(segment, active_LR)
        if len(tokens_K) or spots:
            steered = Steered(segment.sequence.request.id, tokens_K + segment.offset, active_LR[tokens_K])
            found.append((steering, steered, spots))
            is_new = tokens_K >= segment.sequence.counted - segment.start
            if is_new.all():
                counted.append(steered)
            elif is_new.any():
                counted.append(Steered(steered.request_id, steered.tokens_K[is_new], steered.active_KR[is_new]))
    if not found:
        return None

    routes = tuple(sorted({route for steering, *_ in found for route in steering.knobs.routes}, key=launch_order))
    index = {route: p for p, route in enumerate(routes)}
    slot_PT = np.zeros((len(routes), batch.n_tokens), dtype=np.int32)
    knobs_TP3R = np.zeros((batch.n_tokens, len(routes), 3, rank), dtype=np.float32)
    budget_T = np.full(batch.n_tokens, np.inf, dtype=np.float32)
    for steering, steered, spots in found:
        tokens, columns = steered.tokens_K, np.array([index[route] for route in steering.knobs.routes])
        rows, own = tokens[:, None], slice(steering.knobs.terms_NR.shape[1])
        slot_PT[columns[:, None], tokens] = steering.slot
        values_P3R = steering.knobs.values_P3R
        knobs_TP3R[rows, columns, :, own] = values_P3R
        # Selected, not multiplied: an infinite strength out of scope is 0, not NaN.
        knobs_TP3R[rows, columns, 1, own] = np.where(steered.active_KR[:, None, :], values_P3R[None, :, 1, :], 0)
        budget_T[tokens] = steering.knobs.budget
        for spot in spots:
            is_past_P = np.array([not spot.gate.decides(route) for route in routes])
            held = np.ix_(spot.tokens_K, np.flatnonzero(is_past_P), np.flatnonzero(spot.channels_R))
            knobs_TP3R[:, :, 1][held] = 0
    every = tuple(spot for _, _, spots in found for spot in spots)
    return Frame(routes, slot_PT, knobs_TP3R, budget_T, tuple(counted), every, frozenset.intersection(*blanks))


def admitted(steered: Steered, spots: Sequence[Spot], measured: Sequence[np.ndarray]) -> Steered:
    """`steered` without what closed gates kept from acting; `measured[i]` are the projections of `spots[i]`."""
    active_KR = steered.active_KR
    for spot, z_K in zip(spots, measured, strict=True):
        if spot.request_id != steered.request_id:
            continue
        closed = [token for token, z in zip(spot.tokens_K, z_K, strict=True) if not spot.gate.is_open(float(z))]
        if closed:
            active_KR = active_KR & ~(np.isin(steered.tokens_K, closed)[:, None] & spot.channels_R)
    if active_KR is steered.active_KR:
        return steered
    kept = active_KR.any(axis=1)
    return Steered(steered.request_id, steered.tokens_K[kept], active_KR[kept])


STAGES: Mapping[Form, int] = {"mask": 0, "turn": 1, "law": 2, "sparse": 3}
"""The order of the forms at one site: see `steering.edit`."""


def launch_order(route: Route) -> tuple[str, int, int, bool, str, int]:
    """At one write site the forms follow `STAGES`. Of laws the one that reads that very site goes first, so that it
    reads what the model and the edits made; then by read site. Laws of one route read one x, and other routes read
    elsewhere: the order decides nothing else."""
    read = route.read
    return (route.write.tap, route.write.layer, STAGES[route.form], read != route.write, read.tap, read.layer)
