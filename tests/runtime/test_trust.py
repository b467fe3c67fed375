"""The largest weight that keeps the divergence within its bound, against a grid."""

from __future__ import annotations

import torch

from steering.runtime.trust import confine

GENERATOR = torch.Generator().manual_seed(1)
P, Q = (torch.randn(5, 40, generator=GENERATOR, dtype=torch.float64) * 2 for _ in range(2))
KAPPA = torch.tensor([0.0, 0.01, 0.3, 1.0, 100.0], dtype=torch.float64)


def divergence(w: float) -> torch.Tensor:
    p, q = P.log_softmax(-1), Q.log_softmax(-1)
    mixed = (w * p + (1 - w) * q).log_softmax(-1)
    return (mixed.exp() * (mixed - q)).sum(-1)


def test_the_weight_is_the_largest_on_a_grid() -> None:
    mixture = confine(P, Q, KAPPA)
    grid = torch.stack([divergence(w / 500) for w in range(501)])
    assert (grid.diff(dim=0) >= -1e-12).all(), "the divergence grows along the path"
    for row in range(5):
        reached = grid[:, row][grid[:, row] <= KAPPA[row]].max()
        assert float(mixture.kl_B[row]) >= float(reached) - 1e-9
        assert float(mixture.kl_B[row]) <= float(KAPPA[row]) + 1e-9
    assert mixture.is_limited_B.tolist() == [True, True, True, True, False]
    logp = mixture.logits_BV[2].log_softmax(-1)
    q = Q[2].log_softmax(-1)
    assert abs(float((logp.exp() * (logp - q)).sum()) - 0.3) < 1e-9


def test_the_ends_are_exact() -> None:
    mixture = confine(P, Q, KAPPA)
    assert torch.equal(mixture.logits_BV[0], Q[0])
    assert torch.equal(mixture.logits_BV[4], P[4])
    same = confine(P, P, torch.zeros(5))
    assert torch.equal(same.logits_BV, P)
    assert not same.is_limited_B.any()
