"""A planted dictionary is found, figures are sums written out, and what was trained is what encodes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from steering.fit.autoencoder import Activity, Training, fidelity, random_features, selectivity, train
from steering.plan import Autoencoder
from tests.tolerances import CORE

HOW = Training(features=24, l1=0.1, steps=800, lr=5e-3, batch=128, seed=0)


def planted(n: int = 4000, width: int = 16, atoms: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens that are a mean and some of `atoms` unit directions, each at one time in six; and the directions."""
    generator = torch.Generator().manual_seed(seed)
    atoms_KD = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q[:atoms]
    fires = torch.rand(n, atoms, generator=generator) < 1 / 6
    z = fires * (1 + torch.rand(n, atoms, generator=generator))
    return 10 * (z @ atoms_KD + 3 * torch.randn(width, generator=generator)), atoms_KD


@pytest.fixture(scope="module")
def trained() -> Autoencoder:
    return train(planted()[0], HOW)


def test_planted_directions_are_found(trained: Autoencoder) -> None:
    x, atoms = planted()
    assert fidelity(trained, x).explained > 0.97
    assert float((trained.decoder @ atoms.mT).amax(0).min()) > 0.95


def test_a_random_dictionary_explains_less(trained: Autoencoder) -> None:
    found = fidelity(trained, planted(seed=0)[0][:1000])
    assert found.explained > found.random + 0.3
    assert 1 < found.active < 12


def test_decoder_rows_are_unit_vectors_and_the_scale_is_one_number(trained: Autoencoder) -> None:
    x, _ = planted()
    torch.testing.assert_close(trained.decoder.norm(dim=-1), torch.ones(24), **CORE["float32"])
    centred = x.double() - x.double().mean(0)
    assert float(trained.scale) == pytest.approx(float(centred.square().sum(-1).mean().sqrt()), rel=1e-6)


def test_what_was_trained_is_what_encodes() -> None:
    """The loss at the trained weights, from `encode` on raw states, is that of training: the published defect is a
    normalisation that only training has."""
    x, _ = planted(600)
    ae = train(x, replace(HOW, steps=0))
    y, b = x / ae.scale, ae.decoder_bias
    torch.testing.assert_close(ae.encode(x), torch.relu((y - b) @ ae.decoder.mT), rtol=1e-4, atol=1e-4)
    small, large = (train(f * x, replace(HOW, steps=60)) for f in (1.0, 1000.0))
    torch.testing.assert_close(small.encode(x), large.encode(1000 * x), rtol=1e-2, atol=1e-3)


def test_training_is_deterministic_pauses_and_reports() -> None:
    x, _ = planted(500)
    how, done, pauses = replace(HOW, steps=20), [], []
    first = train(x, how, lambda: pauses.append(1), lambda a, b: done.append((a, b)))
    second = train(x, how)
    assert torch.equal(first.encoder, second.encoder)
    assert not torch.equal(first.encoder, train(x, replace(how, seed=1)).encoder)
    assert (len(pauses), done[-1]) == (20, (20, 20))


def test_what_pause_raises_ends_the_training() -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(planted(100)[0], HOW, stop)


def random_ae(m: int = 9, width: int = 5) -> Autoencoder:
    noise = [torch.randn(*shape, dtype=torch.float64) for shape in ((m, width), (m,), (m, width), (width,))]
    return Autoencoder.of(*noise, threshold=torch.rand(m, dtype=torch.float64), scale=1.7)


def test_figures_are_the_sums_written_out() -> None:
    ae, x = random_ae(), torch.randn(9000, 5, dtype=torch.float64)
    found, z = fidelity(ae, x), ae.encode(x)
    missed = (x - ae.decode(z)).square().sum() / (x - x.mean(0)).square().sum()
    assert found.explained == pytest.approx(1 - float(missed), rel=1e-9)
    assert found.active == pytest.approx(float((z > 0).sum(1).double().mean()))
    activity = Activity.of(ae, x)
    for got, wanted in (
        (activity.peak, z.amax(0)),
        (activity.mean, z.mean(0)),
        (activity.rate, (z > 0).double().mean(0)),
        (activity.deviation, z.std(0, correction=0)),
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-10)


def test_selectivity_is_signed_by_class() -> None:
    ae = random_ae()
    plus, minus = (Activity.of(ae, torch.randn(500, 5, dtype=torch.float64) + shift) for shift in (0.5, -0.5))
    told = selectivity(plus, minus)
    torch.testing.assert_close(told, -selectivity(minus, plus))
    assert torch.equal(told > 0, plus.mean > minus.mean)


@pytest.mark.parametrize("centred", [False, True])
def test_unit_rows_leave_the_function_as_it_was(centred: bool) -> None:
    """Rows of any length, one of them zero, and thresholds, from the published equations."""
    W, d = torch.randn(6, 4, dtype=torch.float64), 3 * torch.randn(6, 4, dtype=torch.float64)
    b, b_dec, theta = (torch.randn(k, dtype=torch.float64) for k in (6, 4, 6))
    d[2], theta = 0.0, theta.abs()
    ae = Autoencoder.of(W, b, d, b_dec, theta, centred=centred)
    x = torch.randn(40, 4, dtype=torch.float64)
    p = (x - b_dec if centred else x) @ W.mT + b
    z = torch.where(p > theta, torch.relu(p), 0.0)
    torch.testing.assert_close(ae.decode(ae.encode(x)), z @ d + b_dec, **CORE["law"])
    norms = ae.decoder.norm(dim=-1)
    assert float(norms[2]) == 0
    torch.testing.assert_close(norms[norms > 0], torch.ones(5, dtype=torch.float64), **CORE["law"])


def test_random_features_fire_before_others_and_stand_once() -> None:
    rate = torch.tensor([0.0, 0.5, 0.0, 0.1, 0.2])
    chosen = random_features(rate, 4, seed=0).tolist()
    assert set(chosen[:3]) == {1, 3, 4}
    assert len(set(chosen)) == 4
    assert random_features(rate, 4, seed=0).tolist() == chosen
