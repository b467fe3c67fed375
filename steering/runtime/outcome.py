"""The part of a step that may fail: forward pass, trust region, draw. Nothing here changes a request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from steering.runtime.runner import Reading, Runner
from steering.runtime.sampler import Draw, Drawn, sample
from steering.runtime.scheduler import Batch, Segment
from steering.runtime.scope import Frame
from steering.runtime.trust import confine


class Divergence(NamedTuple):
    """How far a guarded request's token distribution is from its twin's, in nats, and whether the guard limited it."""

    kl: float
    is_limited: bool


class Outcome(NamedTuple):
    """A computed step, nothing of it committed yet. `lost` are the ids whose state is not finite."""

    batch: Batch
    frame: Frame | None
    reading: Reading | None
    drawn: dict[str, Drawn]
    kl: dict[str, Divergence]
    lost: frozenset[str]


def compute(batch: Batch, frame: Frame | None, runner: Runner, draw_of: Callable[[str], Draw]) -> Outcome:
    """Run a batch and draw its tokens. `draw_of` finds a request's side of sampling by id.

    Changes nothing but the cache, at the same places each time, so that a failed step may be repeated in parts.
    """
    sampled, logits_BV, reading = runner(batch, frame)
    if not sampled:
        return Outcome(batch, frame, reading, {}, {}, frozenset())
    logits_BV = logits_BV.to(torch.float32)
    # NaN and Inf survive a sum; one number a row is all that has to be looked at.
    is_finite = logits_BV.sum(-1).isfinite().tolist()
    lost = frozenset(s.sequence.request.id for s, fine in zip(sampled, is_finite, strict=True) if not fine)
    rows = [b for b, s in enumerate(sampled) if not s.is_shadow and s.sequence.request.id not in lost]
    if not rows:
        return Outcome(batch, frame, reading, {}, {}, lost)
    chosen_BV, kl = _confine(logits_BV, rows, sampled)
    names = [sampled[b].sequence.request.id for b in rows]
    drawn = sample(chosen_BV, [draw_of(name) for name in names])
    return Outcome(batch, frame, reading, dict(zip(names, drawn, strict=True)), kl, lost)


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
