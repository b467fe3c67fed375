"""Steps in the air: launched on the device, landed on the host when their results are needed.

    launch   forward pass → trust region → draw, all on the device, and the copies to the host
    land     wait for the copies, make of them what is committed

Between the two the next step can be launched: its tokens are the drawn ones, which do not leave the device for that.
What a step computes of a request that turns out to have ended is thrown away. It may have written keys and values to a
block that was given back meanwhile: whoever holds the block next writes to it in a later launch, and launches take
effect in their order.

Nothing here changes a request; a step may be launched again, whole or in parts, with the same result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from steering.runtime.launches import Account
from steering.runtime.outcome import Divergence, Outcome
from steering.runtime.request import TokenLogprob
from steering.runtime.runner import Output, Runner
from steering.runtime.sampler import Choice, Draw, Drawn, Ranked, choose, rank, reports, told
from steering.runtime.scheduler import Batch, Segment
from steering.runtime.scope import Frame
from steering.runtime.transfer import NOTHING, Download, upload
from steering.runtime.trust import confine

_SLICE = 64
"""Rows of logits that are judged at a time: in float32 they are twice their size, and so are their logarithms."""


class _Judged(NamedTuple):
    """Tokens of one request's prompt, and what is reported of them."""

    request_id: str
    tokens: list[int]
    n_top: int
    ranked: Ranked


@dataclass(frozen=True, slots=True)
class Flight:
    """A launched step. `drawn_T`: its tokens on the device, by segment, if the next step can be launched from them.

    error: what launching it failed with; nothing of the rest is there then.
    """

    batch: Batch
    frame: Frame | None = None
    drawn_T: Tensor | None = None
    sampled: tuple[Segment, ...] = ()
    rows: tuple[int, ...] = ()
    choice: Choice | None = None
    guarded: tuple[str, ...] = ()
    judged: tuple[_Judged, ...] = ()
    failed: Mapping[str, Exception] = field(default_factory=dict)
    account: Account | None = None
    download: Download = NOTHING
    error: Exception | None = None

    def land(self) -> Outcome:
        """The step's outcome. Raises what it failed with."""
        if self.error is not None:
            raise self.error
        host = iter(self.download.wait())
        is_finite = next(host).tolist()
        lost = {s.sequence.request.id for s, fine in zip(self.sampled, is_finite, strict=True) if not fine}
        drawn: dict[str, Drawn] = {}
        kl: dict[str, Divergence] = {}
        if self.choice is not None:
            own = Choice(next(host), self.choice.n_top, _ranked(host) if self.choice.ranked is not None else None)
            names = [self.sampled[b].sequence.request.id for b in self.rows]
            drawn = {name: one for name, one in zip(names, told(own), strict=True) if name not in lost}
        if self.guarded:
            pairs = zip(next(host).tolist(), next(host).tolist(), strict=True)
            kl = {name: Divergence(*pair) for name, pair in zip(self.guarded, pairs, strict=True)}
        judged: dict[str, list[TokenLogprob]] = {}
        for name, tokens, n_top, _ in self.judged:
            some = reports(_ranked(host), tokens, [n_top] * len(tokens))
            judged.setdefault(name, []).extend(some)
            if not all(math.isfinite(one.logprob) for one in some):
                lost.add(name)
        reading = None if self.account is None else self.account.reading(list(host))
        kept = {name: one for name, one in drawn.items() if name not in lost}
        return Outcome(self.batch, self.frame, reading, kept, kl, frozenset(lost), judged, dict(self.failed))


@torch.inference_mode()
def launch(
    batch: Batch,
    frame: Frame | None,
    runner: Runner,
    draw_of: Callable[[str], Draw],
    drawn_T: Tensor | None = None,
) -> Flight:
    """Launch a step. `draw_of` finds a request's side of sampling by id.

    drawn_T: the tokens that the batch runs, where they are drawn but not known yet; all its segments sample then.
    Changes nothing but the cache, at the same places each time, so that a failed step may be repeated in parts.
    """
    is_ahead = drawn_T is not None
    output = runner(batch, frame) if drawn_T is None else runner(batch, frame, drawn_T)
    draws, masks, failed = _masks(output.sampled, draw_of)
    judged = tuple(_judge(output))
    logits_BV = output.logits_BV.to(torch.float32)
    rows = tuple(draws)
    choice, guarded = None, _Guarded()
    if rows:
        chosen_BV, guarded = _confine(logits_BV, rows, output.sampled)
        own_masks = {i: masks[b] for i, b in enumerate(rows) if b in masks}
        choice = choose(chosen_BV, list(draws.values()), own_masks, ahead=int(is_ahead))
    # NaN and Inf survive a sum; one number a row is all that has to be looked at.
    back = [logits_BV.sum(-1).isfinite()]
    if choice is not None:
        back += [choice.tokens_B, *(choice.ranked or ())]
    back += guarded.tensors
    for each in judged:
        back += each.ranked
    if output.account is not None:
        back += output.account.tensors
    can_follow = choice is not None and len(rows) == len(batch.segments) and (is_ahead or _is_decode(batch))
    return Flight(
        batch,
        frame,
        choice.tokens_B if choice is not None and can_follow else None,
        output.sampled,
        rows,
        choice,
        guarded.names,
        judged,
        failed,
        output.account,
        Download(back),
    )


def following(flight: Flight, keep: Sequence[int]) -> Tensor | None:
    """The drawn tokens of some of a flight's segments, None if they cannot be followed."""
    if flight.drawn_T is None or len(keep) == len(flight.drawn_T):
        return flight.drawn_T
    with torch.inference_mode():
        return flight.drawn_T.index_select(0, upload(keep, flight.drawn_T.device, torch.int64))


def _is_decode(batch: Batch) -> bool:
    """Whether all that a step does is to continue completions, each by one token."""
    return batch.n_decode == len(batch.segments) and all(
        segment.start >= segment.sequence.n_prompt and not segment.is_shadow for segment in batch.segments
    )


def _ranked(host: Iterator[Tensor]) -> Ranked:
    return Ranked(*islice(host, 4))


def _masks(
    sampled: Sequence[Segment], draw_of: Callable[[str], Draw]
) -> tuple[dict[int, Draw], dict[int, np.ndarray], dict[str, Exception]]:
    """By row of logits: whose draw it is and what its grammar allows; and, by id, whose grammar failed."""
    draws, masks, failed = dict[int, Draw](), dict[int, np.ndarray](), dict[str, Exception]()
    for b, segment in enumerate(sampled):
        if segment.is_shadow:
            continue
        draw = draw_of(segment.sequence.request.id)
        try:
            mask = draw.mask()
        except Exception as error:  # a grammar is its request's own affair
            failed[segment.sequence.request.id] = error
            continue
        draws[b] = draw
        if mask is not None:
            masks[b] = mask
    return draws, masks, failed


def _judge(output: Output) -> Iterator[_Judged]:
    """How likely the prompts' tokens were, a slice at a time."""
    at = 0
    for segment in output.judged:
        request, tokens, positions = segment.sequence.request, segment.sequence.tokens, segment.judged
        for begin in range(0, len(positions), _SLICE):
            next_tokens = [tokens[position + 1] for position in positions[begin : begin + _SLICE]]
            rows_JV = output.judged_JV[at : at + len(next_tokens)]
            at += len(next_tokens)
            n_top = request.sampling.prompt_logprobs or 0
            next_J = upload(next_tokens, rows_JV.device)
            yield _Judged(request.id, next_tokens, n_top, rank(rows_JV, next_J, n_top))


class _Guarded(NamedTuple):
    """Requests that are kept near their twins: how far they are from them, and which were held back."""

    names: tuple[str, ...] = ()
    tensors: tuple[Tensor, ...] = ()


def _confine(logits_BV: Tensor, rows: Sequence[int], sampled: Sequence[Segment]) -> tuple[Tensor, _Guarded]:
    """The logits of `rows`, those of guarded requests kept near their twins'."""
    device = logits_BV.device
    chosen_BV = logits_BV if len(rows) == len(sampled) else logits_BV.index_select(0, upload(rows, device))
    guarded = [i for i, b in enumerate(rows) if sampled[b].sequence.n_rows == 2]
    if not guarded:
        return chosen_BV, _Guarded()
    twin_of = {s.sequence.request.id: b for b, s in enumerate(sampled) if s.is_shadow}
    requests = [sampled[rows[i]].sequence.request for i in guarded]
    bounds_B = upload([request.program.guard.max_kl for request in requests], device, torch.float64)
    guarded_B = upload(guarded, device)
    twins_BV = logits_BV.index_select(0, upload([twin_of[request.id] for request in requests], device))
    mixture = confine(chosen_BV.index_select(0, guarded_B), twins_BV, bounds_B)
    chosen_BV = chosen_BV.index_copy(0, guarded_B, mixture.logits_BV)
    return chosen_BV, _Guarded(tuple(request.id for request in requests), (mixture.kl_B, mixture.is_limited_B))
