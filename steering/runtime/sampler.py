"""From logits to tokens, a whole batch at once, each row by its own rules.

Order: minimum length and logit bias, penalties, grammar, temperature, min-p, top-k, top-p, draw. With ℓ the model's
(steered) logits, c the counts of a token in the completion and T the temperature:

    repetition ρ    ℓ → ℓ/ρ where ℓ > 0, else ℓρ, for tokens of prompt or completion (arXiv 1909.05858, Sec. 4.1)
    frequency, presence   ℓ → ℓ − α_f c − α_p [c > 0]                                (OpenAI's API reference)
    grammar         ℓ → −∞ for tokens that cannot continue the text as the grammar has it
    min-p           keep p_i ≥ m · max p                                             (arXiv 2407.01082)
    top-k, top-p    keep the k likeliest; of those the fewest whose mass reaches p   (arXiv 1904.09751)
    draw            the first i with cdf_i > u, u the uniform number of (seed, step)

Log-probabilities are those of ℓ itself, before any of this. A uniform number depends on the request's seed and step
alone, so the same request draws the same tokens alone and in any batch.

Legend: B sampled rows · V vocabulary.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from steering.runtime.grammar import Matcher
from steering.runtime.request import Sampling, TokenLogprob
from steering.runtime.transfer import upload

_BLOCK = 64
"""Uniform numbers drawn at a time: making a generator costs more than filling a block."""


class Uniforms:
    """Uniform numbers in [0, 1) by step, from the counter-based Philox generator keyed by a seed."""

    def __init__(self, seed: int | None) -> None:
        key = secrets.randbits(63) if seed is None else seed % 2**64
        self._generator = np.random.Generator(np.random.Philox(key=key))
        self._drawn: list[float] = []

    def __getitem__(self, step: int) -> float:
        while step >= len(self._drawn):
            self._drawn.extend(self._generator.random(_BLOCK).tolist())
        return self._drawn[step]


@dataclass(slots=True)
class Draw:
    """One sequence's side of sampling: its rules, its uniform numbers, and what it has seen.

    `barred` are the ids that may not be drawn before `min_tokens`. The matcher is made with the first mask: a request
    that waits holds none, and one whose grammar fails does so where a step's failures are caught.
    """

    sampling: Sampling
    prompt: frozenset[int]
    barred: tuple[int, ...]
    uniforms: Uniforms
    counts: Counter[int] = field(default_factory=Counter)
    step: int = 0
    matcher: Matcher | None = None

    @classmethod
    def of(cls, sampling: Sampling, prompt: Sequence[int], eos: frozenset[int]) -> Draw:
        """A fresh one; the prompt's tokens are kept only if a penalty asks for them."""
        seen = frozenset(prompt) if sampling.repetition_penalty != 1 else frozenset()
        barred = tuple(eos | set(sampling.stop_token_ids)) if sampling.min_tokens else ()
        return cls(sampling, seen, barred, Uniforms(sampling.seed))

    def advance(self, token: int) -> None:
        """Note a drawn token."""
        self.counts[token] += 1
        self.step += 1
        if self.matcher is not None:
            self.matcher.accept(token)

    @property
    def adjusts(self) -> bool:
        """Whether logits change by rules of the request's own before the temperature."""
        s = self.sampling
        penalised = s.presence_penalty or s.frequency_penalty or s.repetition_penalty != 1
        return bool(penalised or s.logit_bias or self.bars)

    @property
    def bars(self) -> bool:
        """Whether `barred` is to be kept out of the logits; with a grammar its mask sees to that."""
        return self.step < self.sampling.min_tokens and self.sampling.grammar is None

    @property
    def is_steady(self) -> bool:
        """Whether no token changes the rules by which the next one is drawn, which then need not wait for it."""
        return self.sampling.grammar is None and not self.adjusts

    @property
    def is_complete(self) -> bool:
        """Whether the grammar lets nothing follow but the end."""
        return self.matcher is not None and self.matcher.is_complete

    def mask(self) -> np.ndarray | None:
        """uint8, packed: the tokens that the grammar allows now; None without one. Raises what its matcher raises.

        Before `min_tokens` those of `barred` are left out, unless the grammar has no other way to go on.
        """
        if self.sampling.grammar is None:
            return None
        if self.matcher is None:
            self.matcher = self.sampling.grammar.matcher()
        packed = self.matcher.mask()
        if self.step >= self.sampling.min_tokens:
            return packed
        bits = np.unpackbits(packed, bitorder="little")
        bits[list(self.barred)] = 0
        return np.packbits(bits, bitorder="little") if bits.any() else packed


@dataclass(frozen=True, slots=True)
class Drawn:
    """A drawn token and, if asked for, its log-probability."""

    token: int
    logprob: TokenLogprob | None


class Ranked(NamedTuple):
    """What is reported of one token a row: its log-probability and rank, and the likeliest tokens."""

    logprob_B: Tensor
    rank_B: Tensor
    ids_BK: Tensor
    values_BK: Tensor


class Choice(NamedTuple):
    """The tokens of a batch, and the ranks of the rows that report. `n_top`: by row, how many tokens it asks for."""

    tokens_B: Tensor
    n_top: Mapping[int, int]
    ranked: Ranked | None


def sample(logits_BV: Tensor, draws: Sequence[Draw], masks: Mapping[int, np.ndarray] | None = None) -> list[Drawn]:
    """Draw one token for each row of finite logits. Does not advance the draws.

    masks: the packed masks of the rows that have a grammar.
    """
    return told(choose(logits_BV, draws, masks))


def choose(
    logits_BV: Tensor, draws: Sequence[Draw], masks: Mapping[int, np.ndarray] | None = None, *, ahead: int = 0
) -> Choice:
    """The device's part of `sample`; nothing waits for it. A row that is not finite gets some token.

    ahead: how many tokens of each row are drawn and not yet noted; only for draws that are steady.
    """
    raw_BV = logits_BV = logits_BV.to(torch.float32)
    device = logits_BV.device
    if any(draw.adjusts for draw in draws):
        logits_BV = logits_BV.clone()
        for row_V, draw in zip(logits_BV, draws, strict=True):
            if draw.adjusts:
                adjust_(row_V, draw)
    if masks:
        logits_BV = forbid(logits_BV, masks)
    tokens_B = logits_BV.argmax(-1)
    chance = [i for i, draw in enumerate(draws) if not draw.sampling.is_greedy]
    if chance:
        chance_C = None if len(chance) == len(draws) else upload(chance, device)
        rows_CV = logits_BV if chance_C is None else logits_BV.index_select(0, chance_C)
        uniform_C = upload([draws[i].uniforms[draws[i].step + ahead] for i in chance], device, torch.float64)
        drawn_C = invert_cdf(restrict(rows_CV, [draws[i].sampling for i in chance]), uniform_C)
        tokens_B = drawn_C if chance_C is None else tokens_B.index_copy_(0, chance_C, drawn_C)
    n_top = {i: draw.sampling.logprobs for i, draw in enumerate(draws) if draw.sampling.logprobs is not None}
    if not n_top:
        return Choice(tokens_B, n_top, None)
    if len(n_top) == len(draws):
        return Choice(tokens_B, n_top, rank(raw_BV, tokens_B, max(n_top.values())))
    asked_A = upload(list(n_top), device)
    own = raw_BV.index_select(0, asked_A), tokens_B.index_select(0, asked_A)
    return Choice(tokens_B, n_top, rank(*own, max(n_top.values())))


def told(choice: Choice) -> list[Drawn]:
    """The host's part of `sample`, of a choice that lies there."""
    tokens = choice.tokens_B.tolist()
    reported: dict[int, TokenLogprob] = {}
    if choice.ranked is not None:
        own = [tokens[i] for i in choice.n_top]
        reported = dict(zip(choice.n_top, reports(choice.ranked, own, list(choice.n_top.values())), strict=True))
    return [Drawn(token, reported.get(i)) for i, token in enumerate(tokens)]


def adjust_(logits_V: Tensor, draw: Draw) -> None:
    """Minimum length, bias and penalties of one row, in place."""
    s, device = draw.sampling, logits_V.device
    if draw.bars:
        logits_V[list(draw.barred)] = -torch.inf
    if s.logit_bias:
        tokens = torch.tensor(list(s.logit_bias), device=device)
        logits_V[tokens] += torch.tensor(list(s.logit_bias.values()), device=device)
    if s.repetition_penalty != 1:
        tokens = torch.tensor(list(draw.prompt | draw.counts.keys()), device=device)
        picked = logits_V[tokens]
        logits_V[tokens] = torch.where(picked > 0, picked / s.repetition_penalty, picked * s.repetition_penalty)
    if draw.counts and (s.frequency_penalty or s.presence_penalty):
        tokens = torch.tensor(list(draw.counts), device=device)
        counts = torch.tensor(list(draw.counts.values()), device=device)
        logits_V[tokens] -= s.frequency_penalty * counts + s.presence_penalty


def forbid(logits_BV: Tensor, masks: Mapping[int, np.ndarray]) -> Tensor:
    """−inf in the rows of `masks` for every token whose bit is 0; the other rows as they are."""
    rows, device = list(masks), logits_BV.device
    packed_GN = torch.from_numpy(np.stack(list(masks.values()))).to(device)
    bits_GV = (packed_GN[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=device)).bitwise_and_(1).flatten(1)
    logits_BV = logits_BV.clone()
    logits_BV[rows] = logits_BV[rows].masked_fill(bits_GV[:, : logits_BV.shape[1]] == 0, -torch.inf)
    return logits_BV


def restrict(logits_BV: Tensor, rules: Sequence[Sampling]) -> Tensor:
    """Logits over temperature, −inf for every token that min-p, top-k or top-p leaves out."""
    device, vocab = logits_BV.device, logits_BV.shape[1]
    logits_BV = logits_BV / upload([s.temperature for s in rules], device)[:, None]
    if any(s.min_p for s in rules):
        floor = upload([s.min_p for s in rules], device).log()
        logits_BV = logits_BV.masked_fill(logits_BV < logits_BV.amax(-1, keepdim=True) + floor[:, None], -torch.inf)
    limited = [i for i, s in enumerate(rules) if s.top_p < 1 or 0 < s.top_k < vocab]
    if len(limited) == len(rules):
        return _truncate(logits_BV, rules)
    if limited:
        limited_L = upload(limited, device)
        cut_LV = _truncate(logits_BV.index_select(0, limited_L), [rules[i] for i in limited])
        logits_BV = logits_BV.index_copy(0, limited_L, cut_LV)
    return logits_BV


def _truncate(logits_BV: Tensor, rules: Sequence[Sampling]) -> Tensor:
    """Top-k, then top-p on what is left. Equal logits rank by token id."""
    device, vocab = logits_BV.device, logits_BV.shape[1]
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    k_B = upload([s.top_k if 0 < s.top_k < vocab else vocab for s in rules], device)
    p_B = upload([s.top_p for s in rules], device, torch.float64)
    rank_V = torch.arange(vocab, device=device)
    sorted_BV = sorted_BV.masked_fill(rank_V >= k_B[:, None], -torch.inf)
    mass_BV = sorted_BV.softmax(-1, dtype=torch.float64)
    before_BV = mass_BV.cumsum(-1) - mass_BV
    out_BV = (before_BV >= p_B[:, None]) & (p_B[:, None] < 1)
    return torch.empty_like(logits_BV).scatter_(-1, order_BV, sorted_BV.masked_fill(out_BV, -torch.inf))


def invert_cdf(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds the uniform number; never one of probability 0."""
    cdf_BV = logits_BV.softmax(-1, dtype=torch.float64).cumsum(-1)
    point_B1 = (uniform_B * cdf_BV[:, -1]).unsqueeze(1)
    return torch.searchsorted(cdf_BV, point_B1, right=True).squeeze(1).clamp_(max=logits_BV.shape[1] - 1)


def rank(logits_BV: Tensor, tokens_B: Tensor, n_top: int) -> Ranked:
    """What can be reported of one token a row, with up to `n_top` of the likeliest."""
    logprob_BV = logits_BV.to(torch.float32).log_softmax(-1)
    own_B1 = logprob_BV.gather(1, tokens_B[:, None])
    top = logprob_BV.topk(min(n_top, logits_BV.shape[1]))
    return Ranked(own_B1[:, 0], (logprob_BV > own_B1).sum(-1) + 1, top.indices, top.values)


def reports(ranked: Ranked, tokens: Sequence[int], n_top: Sequence[int]) -> list[TokenLogprob]:
    """Log-probability and rank of one token a row, and as many of the likeliest tokens as the row asks for."""
    own, ranks, ids, values = (each.tolist() for each in ranked)
    columns = (tokens, own, ids, values, ranks, n_top)
    return [
        TokenLogprob(token, own, tuple(zip(ids[:n], values[:n], strict=True)), rank)
        for token, own, ids, values, rank, n in zip(*columns, strict=True)
    ]
