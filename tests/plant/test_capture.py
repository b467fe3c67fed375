"""Capture equals the loop over single prompts, and selects the tokens it was asked for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from steering.errors import PlantError
from steering.plant.capture import capture, capture_means, state_sites
from steering.plant.plant import Plant
from steering.types import Site
from tests.plants import FAMILIES, WIDTH, prompts, tiny
from tests.tolerances import PLANT

PROMPTS = prompts(7)


def alone(plant: Plant, prompt: list[int]) -> list[Tensor]:
    """Oracle: the states (T, D) of one prompt, from the model's own record of its blocks' inputs."""
    record = plant.shell()(torch.tensor([prompt]), output_hidden_states=True, use_cache=False).hidden_states
    return [x[0] for x in record[:-1]]  # the last entry is after the final norm


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_mixed_lengths_is_one_by_one(family: str) -> None:
    plant = Plant(tiny(family))
    sites = state_sites(plant)
    assert len(sites) == plant.depth + 1
    found = capture(plant, PROMPTS, sites, skip=0, batch=3)
    for n, prompt in enumerate(PROMPTS):
        for site, expected in zip(sites, alone(plant, prompt), strict=False):
            torch.testing.assert_close(found[site][n], expected, **PLANT["float32"])
    x_last, x_final = (capture(plant, PROMPTS, [site])[site] for site in (sites[-1], Site("final", 0)))
    norm = plant.model.get_submodule(plant.layout.final)
    for state, final in zip(x_last, x_final, strict=True):
        torch.testing.assert_close(norm(state), final, **PLANT["float32"])


@pytest.fixture(scope="module")
def plant() -> Plant:
    return Plant(tiny("llama"))


SITE = Site("resid_pre", 1)


@pytest.mark.parametrize(
    ("positions", "skip", "expected"),
    [
        ("last", 1, [[13], [3]]),
        ("all", 1, [list(range(1, 14)), [1, 2, 3]]),
        ("all", 3, [list(range(3, 14)), [3]]),
        ([range(10, 13), [0, -1]], 1, [[10, 11, 12], [0, 3]]),
    ],
)
def test_positions(plant: Plant, positions: object, skip: int, expected: list[list[int]]) -> None:
    pair = [PROMPTS[0], PROMPTS[0][:4]]
    everything = capture(plant, pair, [SITE], skip=0)[SITE]
    raw = capture(plant, pair, [SITE], positions, skip=skip)[SITE]  # type: ignore[arg-type]
    means = capture_means(plant, pair, [SITE], positions, skip=skip)[SITE]  # type: ignore[arg-type]
    for n, index in enumerate(expected):
        assert torch.equal(raw[n], everything[n][index])
        torch.testing.assert_close(means[n], everything[n][index].mean(0), **PLANT["float32"])


def test_widths_formats_and_progress(plant: Plant) -> None:
    calls: list[tuple[int, int]] = []
    sites = [Site("mlp_act", 0), Site("final", 0)]
    means = capture_means(plant, PROMPTS, sites, batch=3, progress=lambda done, total: calls.append((done, total)))
    assert [means[site].shape for site in sites] == [(7, 48), (7, WIDTH)]
    assert calls == [(3, 7), (6, 7), (7, 7)]
    half = Plant(tiny("llama", dtype=torch.bfloat16))
    assert capture(half, PROMPTS, [SITE])[SITE][0].dtype == torch.float32


def test_capture_leaves_no_hook_on_the_model_even_when_stopped(plant: Plant) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture(plant, PROMPTS, [SITE], progress=stop)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in plant.model.modules())


@pytest.mark.parametrize(
    ("batch", "positions", "message"),
    [
        ([], "all", "no prompts"),
        ([[]], "all", "Prompt 0 has 0 tokens: expected 1 to 128"),
        ([[5] * 129], "all", "Prompt 0 has 129 tokens"),
        ([[5, 6], [5, 64]], "all", "Prompt 1 has tokens from 5 to 64: expected 0 to 63"),
        ([[-1, 6]], "all", "from -1"),
        ([[5, 6], [5]], "all", "Prompt 1 has 1 tokens and not all of the selected positions"),
        ([[5, 6]], [[2]], "not all of the selected positions"),
        ([[5, 6]], [[-3]], "not all of the selected positions"),
        ([[5, 6]], [[0], [1]], r"one entry per prompt \(1\), got 2"),
        ([[5, 6]], "first", "expected 'last', 'all' or indices, got 'first'"),
    ],
)
def test_refusals(plant: Plant, batch: list[list[int]], positions: object, message: str) -> None:
    with pytest.raises(PlantError, match=message):
        capture(plant, batch, [SITE], positions)  # type: ignore[arg-type]


def test_batches_are_bounded_by_their_tokens(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound changes what runs together, not what is found; a prompt longer than it runs alone."""
    whole = capture_means(plant, PROMPTS, [SITE], skip=0)[SITE]
    calls: list[int] = []
    longest = max(map(len, PROMPTS))
    monkeypatch.setattr("steering.plant.capture.BATCH_TOKENS", longest - 1)
    found = capture_means(plant, PROMPTS, [SITE], skip=0, progress=lambda done, _: calls.append(done))[SITE]
    torch.testing.assert_close(found, whole, **PLANT["float32"])
    assert calls[-1] == len(PROMPTS)
    assert len(calls) > 1
    assert calls[-1] - calls[-2] == 1


def test_a_pause_comes_after_every_layer_of_every_batch(plant: Plant) -> None:
    pauses: list[None] = []
    sites = state_sites(plant)
    capture_means(plant, PROMPTS, sites, batch=3, skip=0, pause=lambda: pauses.append(None))
    assert len(pauses) == len(sites) * math.ceil(len(PROMPTS) / 3)
