"""Layer Jacobians against finite differences, full-sequence autograd and each other, in every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from steering.errors import DimensionMismatch, PlantError
from steering.plant import jacobian
from steering.plant.jacobian import Linearisation
from steering.plant.plant import Plant
from steering.types import Site
from tests.plants import FAMILIES, WIDTH, prompts, tiny
from tests.tolerances import PLANT

PROMPTS = prompts(3)  # 14 tokens and two shorter ones: past the 8-token windows, and within them


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def through_the_sequence(plant: Plant, prompt: list[int], layer: int) -> Tensor:
    """Oracle: ∂ (block output of the last token) / ∂ (its block input), the whole sequence in one graph."""
    seen: dict[str, Tensor] = {}

    def leaf(x: Tensor) -> Tensor:
        seen["x"] = x.detach().requires_grad_()
        return seen["x"]

    shell = plant.shell("eager")
    shell.set_experts_implementation("eager")
    plant.tap(shell, Site("resid_pre", layer), leaf)
    plant.tap(shell, Site("resid_post", layer), lambda y: seen.__setitem__("y", y))
    with torch.enable_grad():  # one copy of the sequence per row of the Jacobian
        shell.base_model(torch.tensor([prompt]).expand(WIDTH, -1), use_cache=False)
        (rows,) = torch.autograd.grad(seen["y"][:, -1], seen["x"], torch.eye(WIDTH))
    return rows[:, -1]


def by_differences(line: Linearisation, layer: int, step: float) -> Tensor:
    """Oracle: central differences of every prompt's f_l, averaged."""
    nudge = step * torch.eye(line.width, dtype=line.dtype)
    slopes = []
    for n, x_LD in enumerate(line.states_PLD):
        up, down = (line.step(layer, n, x_LD[layer] + sign * nudge) for sign in (1, -1))
        slopes.append((up - down).T / (2 * step))
    return torch.stack(slopes).mean(0)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_autograd_through_the_whole_sequence(family: str, layer: int) -> None:
    plant = Plant(tiny(family))
    oracle = torch.stack([through_the_sequence(plant, prompt, layer) for prompt in PROMPTS]).mean(0)
    A = Linearisation(plant, PROMPTS).jacobian(layer)
    assert error(A, oracle) < PLANT["jacobian_float32"]
    assert error(A, torch.eye(WIDTH)) > 0.2  # a block that is nearly the identity would prove little


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_and_reverse_mode_and_differences_agree(family: str) -> None:
    line = Linearisation(Plant(tiny(family, dtype=torch.float64)), PROMPTS)
    exact = family == "gpt2"  # its blocks have no part in float32
    for layer in range(line.depth):
        A = line.jacobian(layer, "vjp")
        assert A.dtype == torch.float64
        assert error(line.jacobian(layer, "jvp"), A) < PLANT["jacobian_float64" if exact else "jacobian_mixed"]
        differences = by_differences(line, layer, 1e-4 if exact else 1e-2)
        assert error(differences, A) < PLANT["finite_difference_float64" if exact else "finite_difference"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_map_reproduces_the_model(family: str) -> None:
    plant = Plant(tiny(family))
    line = Linearisation(plant, PROMPTS)
    assert line.states_PLD.shape == (3, plant.depth + 1, WIDTH)
    for n, prompt in enumerate(PROMPTS):
        record = plant.shell()(torch.tensor([prompt]), output_hidden_states=True, use_cache=False).hidden_states
        for layer in range(plant.depth):
            x_D, y_D = line.states_PLD[n, layer], line.states_PLD[n, layer + 1]
            torch.testing.assert_close(x_D, record[layer][0, -1], **PLANT["float32"])
            torch.testing.assert_close(line.step(layer, n, x_D[None])[0], y_D, **PLANT["float32"])


@pytest.fixture(scope="module")
def plant() -> Plant:
    return Plant(tiny("mistral"))


def test_products_are_products_with_the_jacobian(plant: Plant) -> None:
    line = Linearisation(plant, PROMPTS)
    A = line.jacobian(1).double()
    assert line.products == WIDTH * 3
    W = torch.randn(5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert line.vjp(1, W).dtype == torch.float64
    assert error(line.vjp(1, W), W @ A) < PLANT["jacobian_float32"]
    assert error(line.jvp(1, W), W @ A.T) < PLANT["jacobian_float32"]
    assert line.products == WIDTH * 3 + 3 * 5 * 3


def test_prompts_in_one_batch_are_the_prompts_alone(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths 1 to 14 beside each other, in a batch of all and in batches of two: pads change nothing."""
    mixed = [*PROMPTS, PROMPTS[0][:1], PROMPTS[0][:9]]
    alone = torch.stack([Linearisation(plant, [prompt]).jacobian(1) for prompt in mixed]).mean(0)
    assert error(Linearisation(plant, mixed).jacobian(1), alone) < PLANT["jacobian_float32"]
    monkeypatch.setattr(jacobian, "GROUP", 2)
    line = Linearisation(plant, mixed)
    assert error(line.jacobian(1), alone) < PLANT["jacobian_float32"]
    assert error(line.jacobian(1, "jvp"), alone) < PLANT["jacobian_float32"]
    assert line.products == 2 * WIDTH * 5
    x_1D = line.states_PLD[4, 1][None]
    torch.testing.assert_close(line.step(1, 4, x_1D)[0], line.states_PLD[4, 2], **PLANT["float32"])


@pytest.mark.parametrize("method", ["vjp", "jvp"])
def test_chunks_change_nothing(plant: Plant, method: Any) -> None:
    line = Linearisation(plant, PROMPTS)
    whole = line.jacobian(2, method)
    assert error(line.jacobian(2, method, chunk=5), whole) < PLANT["jacobian_float32"]


def test_the_mean_is_over_the_prompts_and_repeats(plant: Plant) -> None:
    both = Linearisation(plant, PROMPTS[:2])
    single = [Linearisation(plant, [prompt]).jacobian(1) for prompt in PROMPTS[:2]]
    assert error(both.jacobian(1), (single[0] + single[1]) / 2) < PLANT["jacobian_float32"]
    assert error(single[0], single[1]) > 1e-3
    assert torch.equal(both.jacobian(1), both.jacobian(1))  # no call leaves a trace in the frozen prefix


def test_long_prompts_keep_their_last_tokens(plant: Plant) -> None:
    cut = Linearisation(plant, [PROMPTS[0]], max_context=6)
    assert torch.equal(cut.states_PLD, Linearisation(plant, [PROMPTS[0][-6:]]).states_PLD)
    assert not torch.equal(cut.states_PLD, Linearisation(plant, [PROMPTS[0]]).states_PLD)


def test_a_single_token_has_no_prefix(plant: Plant) -> None:
    prompt = PROMPTS[0][:1]
    A = Linearisation(plant, [prompt]).jacobian(1)
    assert error(A, through_the_sequence(plant, prompt, 1)) < PLANT["jacobian_float32"]


def test_layers_come_from_the_last_backward(plant: Plant) -> None:
    line = Linearisation(plant, PROMPTS)
    calls: list[tuple[int, int]] = []
    found = list(line.jacobians(chunk=WIDTH // 2, progress=lambda done, total: calls.append((done, total))))
    assert [layer for layer, _ in found] == [2, 1, 0]
    piece = WIDTH // 2 * len(PROMPTS)  # progress is finer than a layer
    assert calls == [(n * piece, 6 * piece) for n in range(1, 7)]
    assert torch.equal(found[1][1], line.jacobian(1))
    assert [layer for layer, _ in line.jacobians([0, 2])] == [2, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_16_bit_model_is_linearised_in_float32(family: str) -> None:
    half = Plant(tiny(family, dtype=torch.bfloat16))
    line = Linearisation(half, PROMPTS)
    assert line.jacobian(1).dtype == torch.float32
    assert error(line.jacobian(1, "jvp"), line.jacobian(1)) < PLANT["jacobian_float32"]
    assert error(by_differences(line, 1, 1e-2), line.jacobian(1)) < PLANT["finite_difference"]
    assert half.dtype == torch.bfloat16


def test_the_model_is_left_alone(plant: Plant) -> None:
    Linearisation(plant, PROMPTS).jacobian(0)
    assert plant.model.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in plant.model.modules())
    assert not any(parameter.requires_grad for parameter in plant.model.parameters())


def test_refusals(plant: Plant) -> None:
    with pytest.raises(PlantError, match="no prompts"):
        Linearisation(plant, [])
    with pytest.raises(PlantError, match="max_context: expected at least 1"):
        Linearisation(plant, PROMPTS, max_context=0)
    line = Linearisation(plant, PROMPTS)
    with pytest.raises(PlantError, match="no layer 3: expected 0 to 2"):
        line.jacobian(3)
    with pytest.raises(PlantError, match="no prompt 3: expected 0 to 2"):
        line.step(0, 3, torch.zeros(1, WIDTH))
    with pytest.raises(PlantError, match="expected vjp or jvp, got 'fd'"):
        line.jacobian(0, "fd")  # type: ignore[arg-type]
    for shape in [(WIDTH,), (2, WIDTH + 1)]:
        with pytest.raises(DimensionMismatch, match=r"shape \(K, 32\), got"):
            line.vjp(0, torch.zeros(shape))


def test_a_pause_comes_after_every_prompt_and_every_piece(plant: Plant) -> None:
    pauses: list[None] = []
    line = Linearisation(plant, PROMPTS, pause=lambda: pauses.append(None))
    assert len(pauses) == len(PROMPTS)
    line.jacobian(1, chunk=plant.width // 2)
    assert len(pauses) == len(PROMPTS) + 2
