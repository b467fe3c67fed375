"""The part of a step that may fail: forward pass, trust region, draw. Nothing here changes a request."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from steering.runtime.request import TokenLogprob
from steering.runtime.runner import Output, Reading, Runner
from steering.runtime.sampler import Draw, Drawn, report, sample
from steering.runtime.scheduler import Batch, Segment
from steering.runtime.scope import Frame
from steering.runtime.trust import confine

_SLICE = 64
"""Rows of logits that are judged at a time: in float32 they are twice their size, and so are their logarithms."""


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


def compute(batch: Batch, frame: Frame | None, runner: Runner, draw_of: Callable[[str], Draw]) -> Outcome:
    """Run a batch and draw its tokens. `draw_of` finds a request's side of sampling by id.

    Changes nothing but the cache, at the same places each time, so that a failed step may be repeated in parts.
    """
    output = runner(batch, frame)
    draws, masks, failed = _masks(output.sampled, draw_of)
    judged, lost = _judge(output)
    sampled, logits_BV = output.sampled, output.logits_BV.to(torch.float32)
    # NaN and Inf survive a sum; one number a row is all that has to be looked at.
    is_finite = logits_BV.sum(-1).isfinite().tolist()
    lost |= {s.sequence.request.id for s, fine in zip(sampled, is_finite, strict=True) if not fine}
    rows = [b for b, s in enumerate(sampled) if b in draws and s.sequence.request.id not in lost]
    drawn: dict[str, Drawn] = {}
    kl: dict[str, Divergence] = {}
    if rows:
        chosen_BV, kl = _confine(logits_BV, rows, sampled)
        own_masks = {i: masks[b] for i, b in enumerate(rows) if b in masks}
        tokens = sample(chosen_BV, [draws[b] for b in rows], own_masks)
        drawn = {sampled[b].sequence.request.id: token for b, token in zip(rows, tokens, strict=True)}
    return Outcome(batch, frame, output.reading, drawn, kl, frozenset(lost), judged, failed)


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


def _judge(output: Output) -> tuple[dict[str, list[TokenLogprob]], set[str]]:
    """How likely the prompts' tokens were, by request; and the ids whose logits are not finite."""
    reports: dict[str, list[TokenLogprob]] = {}
    lost: set[str] = set()
    at = 0
    for segment in output.judged:
        request, tokens = segment.sequence.request, segment.sequence.tokens
        own = reports.setdefault(request.id, [])
        positions = segment.judged
        for begin in range(0, len(positions), _SLICE):
            following = [tokens[position + 1] for position in positions[begin : begin + _SLICE]]
            rows_JV = output.judged_JV[at : at + len(following)]
            at += len(following)
            own += report(rows_JV, following, [request.sampling.prompt_logprobs or 0] * len(following))
        if not all(math.isfinite(one.logprob) for one in own):
            lost.add(request.id)
    return reports, lost


def _confine(
    logits_BV: Tensor, rows: Sequence[int], sampled: Sequence[Segment]
) -> tuple[Tensor, dict[str, Divergence]]:
    """The logits of `rows`, those of guarded requests kept near their twins'; and how far they are from them."""
    chosen_BV = logits_BV if len(rows) == len(sampled) else logits_BV[rows]
    guarded = [i for i, b in enumerate(rows) if sampled[b].sequence.n_rows == 2]
    if not guarded:
        return chosen_BV, {}
    twin_of = {s.sequence.request.id: b for b, s in enumerate(sampled) if s.is_shadow}
    requests = [sampled[rows[i]].sequence.request for i in guarded]
    bounds = [request.program.guard.max_kl for request in requests]
    bounds_B = torch.tensor(bounds, dtype=torch.float64, device=logits_BV.device)
    mixture = confine(chosen_BV[guarded], logits_BV[[twin_of[request.id] for request in requests]], bounds_B)
    chosen_BV = chosen_BV.clone()
    chosen_BV[guarded] = mixture.logits_BV
    pairs = zip(mixture.kl_B.tolist(), mixture.is_limited_B.tolist(), strict=True)
    return chosen_BV, {request.id: Divergence(*pair) for request, pair in zip(requests, pairs, strict=True)}
