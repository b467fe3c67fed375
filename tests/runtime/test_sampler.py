"""Sampling rules against their definitions, written out one row at a time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steering.runtime.request import Sampling
from steering.runtime.sampler import (
    Draw,
    Uniforms,
    adjust_,
    choose,
    forbid,
    invert_cdf,
    rank,
    reports,
    restrict,
    sample,
    told,
)

V = 12
GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(6, V, generator=GENERATOR) * 3


def draw(sampling: Sampling, prompt: tuple[int, ...] = (1,), seen: tuple[int, ...] = (), eos: int = 0) -> Draw:
    made = Draw.of(sampling, prompt, frozenset({eos}))
    for token in seen:
        made.advance(token)
    return made


@settings(max_examples=40, deadline=None)
@given(st.integers(0, V + 2), st.floats(0.05, 1), st.floats(0, 0.9), st.floats(0.2, 2), st.integers(0, 5))
def test_truncation_equals_its_definition(k: int, p: float, m: float, temperature: float, row: int) -> None:
    rule = Sampling(top_k=k, top_p=p, min_p=m, temperature=temperature)
    kept = restrict(LOGITS[row : row + 1], [rule])[0]
    z = LOGITS[row].double().numpy() / temperature
    probability = np.exp(z - z.max())
    alive = probability >= m * probability.max() * (1 - 1e-6)
    order = sorted(np.flatnonzero(alive), key=lambda i: (-z[i], i))[: k or V]
    mass, wanted = 0.0, set()
    for i in order:
        if mass >= p * (1 - 1e-7) and p < 1:
            break
        wanted.add(int(i))
        mass += probability[i] / sum(probability[j] for j in order)
    assert set(torch.isfinite(kept).nonzero().flatten().tolist()) == wanted
    inside = sorted(wanted)
    assert torch.allclose(kept[inside], (LOGITS[row] / temperature)[inside])


def test_ties_rank_by_token_and_rows_have_their_own_rules() -> None:
    equal = torch.zeros(3, V)
    kept = restrict(equal, [Sampling(top_k=2), Sampling(), Sampling(top_p=0.2)])
    assert [torch.isfinite(row).nonzero().flatten().tolist() for row in kept] == [[0, 1], list(range(V)), [0, 1, 2]]


def test_penalties_equal_their_formulas() -> None:
    s = Sampling(
        presence_penalty=0.5,
        frequency_penalty=0.25,
        repetition_penalty=1.5,
        logit_bias={3: 4.0, 5: -100.0},
        min_tokens=9,
    )
    row = LOGITS[0].clone()
    adjust_(row, draw(s, prompt=(2, 3), seen=(3, 3, 7), eos=4))
    wanted = LOGITS[0].double().numpy().copy()
    wanted[4] = -np.inf
    wanted[3] += 4
    wanted[5] -= 100
    for token in (2, 3, 7):
        wanted[token] = wanted[token] / 1.5 if wanted[token] > 0 else wanted[token] * 1.5
    wanted[3] -= 0.25 * 2 + 0.5
    wanted[7] -= 0.25 * 1 + 0.5
    np.testing.assert_allclose(row.numpy(), wanted, rtol=1e-6)


def test_logprobs_are_those_of_the_raw_logits() -> None:
    s = Sampling(temperature=0.3, logit_bias={2: 100.0}, top_k=1, logprobs=3, seed=1)
    token, report = (x := sample(LOGITS, [draw(s)] * 6)[4]).token, x.logprob
    raw = LOGITS[4].double().log_softmax(-1)
    assert token == 2
    assert report is not None
    assert report.logprob == pytest.approx(float(raw[2]), abs=1e-6)
    assert [t for t, _ in report.top] == raw.topk(3).indices.tolist()
    assert [v for _, v in report.top] == pytest.approx(raw.topk(3).values.tolist(), abs=1e-6)
    assert sample(LOGITS, [draw(Sampling())] * 6)[0].logprob is None


def test_a_row_draws_alone_what_it_draws_in_a_batch() -> None:
    rules = [
        Sampling(temperature=t, top_k=k, top_p=p, seed=i)
        for i, (t, k, p) in enumerate([(0, 0, 1), (1, 0, 1), (1, 3, 1), (0.7, 0, 0.8), (2, 5, 0.9), (1, 0, 1)])
    ]
    together = sample(LOGITS, [draw(rule) for rule in rules])
    alone = [sample(LOGITS[i : i + 1], [draw(rule)])[0] for i, rule in enumerate(rules)]
    assert together == alone
    assert together[0].token == int(LOGITS[0].argmax())


def test_draws_follow_the_distribution() -> None:
    n = 20000
    uniform = torch.tensor([Uniforms(7)[0], *numbers_of(8, n - 1)], dtype=torch.float64)
    tokens = invert_cdf(LOGITS[:1].expand(n, V), uniform)
    share = torch.bincount(tokens, minlength=V) / n
    assert float((share - LOGITS[0].softmax(-1)).abs().max()) < 4 * 0.5 / n**0.5


def numbers_of(seed: int, n: int) -> list[float]:
    numbers = Uniforms(seed)
    return [numbers[i] for i in range(n)]


def test_the_ends_of_the_unit_interval_never_draw_what_is_impossible() -> None:
    row = torch.full((2, V), -torch.inf)
    row[:, 3:6] = 0
    assert invert_cdf(row, torch.tensor([0.0, 1 - 1e-16], dtype=torch.float64)).tolist() == [3, 5]


def test_uniform_numbers_depend_on_seed_and_step_alone() -> None:
    a, b = Uniforms(5), Uniforms(5)
    late = b[200]
    assert [a[i] for i in range(201)][-1] == late
    assert Uniforms(-1)[0] != Uniforms(5)[0]
    assert Uniforms(None)[0] != Uniforms(None)[0]
    assert all(0 <= a[i] < 1 for i in range(100))


def test_a_token_drawn_ahead_is_the_one_drawn_in_its_turn() -> None:
    rules = [Sampling(seed=i, temperature=(0.0, 1.5)[i % 2], logprobs=(None, 2)[i // 3]) for i in range(6)]
    draws = [draw(rule) for rule in rules]
    ahead = told(choose(LOGITS, draws, ahead=1))
    for each in draws:
        each.advance(3)
    assert ahead == sample(LOGITS, draws)
    assert all(each.is_steady for each in draws)
    assert not any(
        draw(rule).is_steady
        for rule in (Sampling(logit_bias={1: 1.0}), Sampling(min_tokens=1), Sampling(frequency_penalty=0.1))
    )


def test_a_row_that_is_not_finite_gets_some_token() -> None:
    """What is drawn for a request whose state is lost must be a token, or the step in the air would not run."""
    spoilt = LOGITS.clone()
    spoilt[1::2] = torch.nan
    rules = [Sampling(), Sampling(temperature=0), Sampling(top_p=0.5), Sampling(min_p=0.1, top_k=3)]
    for rule in rules:
        choice = choose(spoilt, [draw(replace(rule, seed=1, logprobs=1))] * 6)
        assert ((choice.tokens_B >= 0) & (choice.tokens_B < V)).all()
        clean = choose(LOGITS, [draw(replace(rule, seed=1, logprobs=1))] * 6)
        assert torch.equal(choice.tokens_B[::2], clean.tokens_B[::2])


def test_a_report_counts_the_likelier_tokens() -> None:
    order = LOGITS[2].argsort(descending=True).tolist()
    tokens = [order[0], order[4], order[-1]]
    three = reports(rank(LOGITS[2:3].expand(3, V), torch.tensor(tokens), 20), tokens, [0, 2, 20])
    assert [(r.token, r.rank) for r in three] == list(zip(tokens, (1, 5, V), strict=True))
    assert [[t for t, _ in r.top] for r in three] == [[], order[:2], order]
    (tied,) = reports(rank(torch.zeros(1, V), torch.tensor([7]), 0), [7], [0])
    assert tied.rank == 1


def test_a_mask_forbids_by_packed_bits_and_leaves_the_other_rows() -> None:
    keep = np.array([1, 6, 11])
    bits = np.zeros(16, dtype=np.uint8)
    bits[[*keep, 13]] = 1  # beyond the vocabulary: of no effect
    masked = forbid(LOGITS, {4: np.packbits(bits, bitorder="little")})
    assert torch.isfinite(masked[4]).nonzero().flatten().tolist() == keep.tolist()
    assert torch.equal(masked[4, keep], LOGITS[4, keep])
    others = [0, 1, 2, 3, 5]
    assert torch.equal(masked[others], LOGITS[others])
