"""A fit finds what was planted, counts what it computes, and refuses what cannot be fitted."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu
from torch import Tensor

from steering.artifact import Artifact
from steering.concept import Concept
from steering.control import Weights, regulate
from steering.errors import ControlError, PlantError, SpecError
from steering.fit import FitSettings, difference_of_means, fit_concept
from steering.fit.concept import auroc, data_hash, gains_along
from steering.plant.capture import capture_means, state_sites
from steering.plant.jacobian import Linearisation
from steering.plant.plant import Plant
from steering.types import Gains
from tests.control.cases import directions
from tests.plants import WIDTH, tiny, tiny_tokenizer
from tests.tolerances import CORE

SUBJECTS = ("cat", "dog", "bird", "tree", "house", "sun", "moon", "sky", "sea", "river", "hill", "road")
POSITIVE: list[Any] = [f"the {s} is good and nice and happy" for s in SUBJECTS]
NEGATIVE: list[Any] = [f"the {s} is bad and rude and sad" for s in SUBJECTS]
LAYERS, PROMPTS = 4, 6


@pytest.fixture(scope="module")
def plant() -> Plant:
    return Plant(tiny("llama", layers=LAYERS), tiny_tokenizer())


@pytest.fixture(scope="module")
def fitted(plant: Plant) -> Concept:
    settings = FitSettings(gains=("dense", "matrix_free"), q=0.5, r=2.0, q_f=1.5, jacobian_prompts=PROMPTS, skip=2)
    return fit_concept(plant, "tone", POSITIVE, NEGATIVE, settings)


# Means


def planted(n: int = 40, noise: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positive and negative states (N, 3, D), with their direction and magnitude; layer 1 carries nothing."""
    v, magnitude = directions(3, 8, 1), torch.tensor([2.0, 0.0, 0.5], dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    base = 5 * directions(3, 8, 9) + torch.randn(n, 3, 8, generator=generator, dtype=torch.float64)
    other = base + noise * torch.randn(n, 3, 8, generator=generator, dtype=torch.float64)
    return base + magnitude[:, None] * v, other, v, magnitude


def test_difference_of_means_recovers_what_was_planted() -> None:
    positive, negative, v, magnitude = planted()
    direction, found, origin = difference_of_means(positive, negative)
    assert direction.dtype == found.dtype == origin.dtype == torch.float32
    torch.testing.assert_close(found.double(), magnitude, **CORE["mean"])
    for layer in (0, 2):
        torch.testing.assert_close(direction[layer].double(), v[layer], **CORE["mean"])
    assert not direction[1].any()
    assert float(found[1]) == float(origin[1]) == 0.0


def test_the_scale_between_the_class_means_is_zero_to_one() -> None:
    positive, negative, *_ = planted(noise=1.0)
    direction, magnitude, origin = difference_of_means(positive, negative)
    for states, expected in ((negative, 0.0), (positive, 1.0)):
        projection = (states.mean(0) * direction).sum(-1)
        torch.testing.assert_close(
            ((projection - origin) / magnitude)[[0, 2]].float(), torch.full((2,), expected), **CORE["mean"]
        )


def test_differences_below_the_rounding_of_the_states_are_no_direction() -> None:
    positive, negative, *_ = planted()
    direction, magnitude, _ = difference_of_means(negative + 1e-7, negative)
    assert not direction.any()
    assert not magnitude.any()
    assert difference_of_means(positive + 1e3, negative)[0].any()


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=8), st.lists(st.integers(-4, 4), min_size=1, max_size=8))
def test_auroc_is_the_share_of_ordered_pairs(plus: list[int], minus: list[int]) -> None:
    slow = sum((p > m) + 0.5 * (p == m) for p in plus for m in minus) / (len(plus) * len(minus))
    found = auroc(torch.tensor(plus).float(), torch.tensor(minus).float())
    assert found == pytest.approx(slow, rel=CORE["interval"])
    assert found == pytest.approx(mannwhitneyu(plus, minus).statistic / (len(plus) * len(minus)), rel=CORE["interval"])


# Settings


@pytest.mark.parametrize(
    ("changes", "error", "param"),
    [
        ({"gains": ()}, SpecError, "gains"),
        ({"gains": ("sparse",)}, SpecError, "gains"),
        ({"positions": "first"}, SpecError, "positions"),
        ({"jacobian_prompts": 0}, SpecError, "jacobian_prompts"),
        ({"jacobian_prompts": 1025}, SpecError, "jacobian_prompts"),
        ({"skip": -1}, SpecError, "skip"),
        ({"r": 0.0}, ControlError, "r"),
        ({"q": -1.0}, ControlError, "q"),
        ({"q_f": float("nan")}, ControlError, "q_f"),
        ({"q": 0.0, "q_f": 0.0}, ControlError, "q"),
    ],
)
def test_impossible_settings_are_refused_by_name(changes: dict[str, Any], error: type, param: str) -> None:
    with pytest.raises(error) as caught:
        FitSettings(**changes)
    assert caught.value.param == param  # type: ignore[attr-defined]


def test_controlled_layers() -> None:
    assert FitSettings().controlled(4) == range(1, 4)
    assert FitSettings().controlled(1) == range(1)
    assert FitSettings(layers=(3, 2)).controlled(4) == range(2, 4)
    for layers in ((), (4,), (-1,), (0, 2)):
        with pytest.raises(SpecError) as caught:
            FitSettings(layers=layers).controlled(4)
        assert caught.value.param == "layers"


# The whole fit


def test_shapes_and_provenance(plant: Plant, fitted: Concept) -> None:
    assert (fitted.name, fitted.model, fitted.layers) == ("tone", plant.fingerprint, (1, 2, 3))
    assert fitted.direction.shape == (LAYERS + 1, WIDTH)
    assert fitted.weights == Weights(0.5, 2.0, 1.5)
    assert fitted.default_gains == "dense"
    norms = fitted.direction.norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones(LAYERS + 1), **CORE["mean"])
    for gain in fitted.gains.values():
        assert not gain[0].any()
        assert gain[1:].any(dim=-1).all()
    assert fitted.provenance["examples"] == {"positive": 12, "negative": 12}
    assert fitted.provenance["data"] == data_hash({"positive": POSITIVE, "negative": NEGATIVE})
    assert data_hash({"positive": NEGATIVE, "negative": POSITIVE}) != fitted.provenance["data"]


def test_the_products_that_were_computed_are_counted(fitted: Concept) -> None:
    n = len(fitted.layers)
    assert fitted.quality["jacobian_products"] == {
        "dense": n * WIDTH * PROMPTS,
        "matrix_free": n * (n + 1) // 2 * PROMPTS,
    }


def test_the_means_are_those_of_the_examples_that_are_not_held_out(plant: Plant, fitted: Concept) -> None:
    """Oracle: one example at a time through hooks of its own."""
    states: list[Tensor] = []

    def keep_input(_: object, args: tuple[Tensor]) -> None:
        states.append(args[0][0, 2:].double().mean(0))

    def keep_output(_: object, __: object, output: Tensor) -> None:
        states.append(output[0, 2:].double().mean(0))

    shell = plant.shell()
    for block in shell.model.layers:
        block.register_forward_pre_hook(keep_input)
    block.register_forward_hook(keep_output)
    E = torch.zeros(LAYERS + 1, WIDTH, dtype=torch.float64)
    kept = [i for i in range(12) if i % 5]
    for rows, sign in ((POSITIVE, 1), (NEGATIVE, -1)):
        for i in kept:
            states.clear()
            shell(torch.tensor([plant.encode(rows[i])]))
            E += sign * torch.stack(states) / len(kept)
    torch.testing.assert_close(fitted.magnitude.double(), E.norm(dim=-1), **CORE["mean"])
    torch.testing.assert_close(fitted.direction.double() * fitted.magnitude.double()[:, None], E, **CORE["mean"])


def test_the_dense_gain_is_the_regulator_s(plant: Plant, fitted: Concept) -> None:
    """Same prompts as the fit: half of each class, evenly spread, cut behind the middle of what is read."""
    prompts = []
    for rows in (POSITIVE, NEGATIVE):
        for i in (0, 4, 8):
            ids = plant.encode(rows[i])
            prompts.append(ids[: 2 + (len(ids) - 2) // 2 + 1])
    linear = Linearisation(plant, prompts)
    K_LDD = regulate(torch.stack([linear.jacobian(layer) for layer in (1, 2, 3)]), fitted.weights).K_LDD
    expected = torch.einsum("lij,lj->li", K_LDD, fitted.direction[1:4].double())
    torch.testing.assert_close(fitted.gain("dense")[1:].double(), expected, rtol=1e-4, atol=1e-5)


def test_quality_is_measured_on_the_examples_held_out(plant: Plant, fitted: Concept) -> None:
    quality, sites = fitted.quality, state_sites(plant)
    assert quality["measured_on"] == "held-out"
    assert all(len(quality[name]) == LAYERS + 1 for name in ("auroc", "separation", "split_half_cosine"))
    scores = []
    for rows in (POSITIVE, NEGATIVE):
        means = capture_means(plant, [plant.encode(rows[i]) for i in (0, 5, 10)], sites, skip=2)
        scores.append(torch.stack([means[s] @ v for s, v in zip(sites, fitted.direction, strict=True)]).double())
    plus_L3, minus_L3 = scores
    ordered_L = (plus_L3[:, :, None] > minus_L3[:, None]).double().mean((1, 2))
    assert quality["auroc"] == [round(float(share), 4) for share in ordered_L]
    pooled_L = ((plus_L3.var(1, correction=0) + minus_L3.var(1, correction=0)) / 2).sqrt()
    separation_L = (plus_L3.mean(1) - minus_L3.mean(1)) / pooled_L
    assert quality["separation"] == pytest.approx(separation_L.tolist(), rel=1e-3)
    assert quality["auroc"][0] == 1.0  # the words themselves differ
    halves = []
    for part in range(2):
        means_by_class = []
        for rows in (POSITIVE, NEGATIVE):
            means = capture_means(plant, [plant.encode(row) for row in rows[part::2]], sites, skip=2)
            means_by_class.append(torch.stack([means[site].mean(0) for site in sites]))
        halves.append(means_by_class[0] - means_by_class[1])
    cosine_L = torch.nn.functional.cosine_similarity(*halves)
    assert quality["split_half_cosine"] == pytest.approx(cosine_L.tolist(), abs=1e-3)


def test_save_and_load(fitted: Concept, tmp_path: Path) -> None:
    artifact = fitted.artifact()
    loaded = Concept.from_artifact(Artifact.load(artifact.save(tmp_path)))
    assert loaded.artifact().fingerprint == artifact.fingerprint
    assert torch.equal(loaded.gain("matrix_free"), fitted.gain("matrix_free"))


def test_the_same_examples_give_the_same_concept(plant: Plant, fitted: Concept) -> None:
    settings = FitSettings(gains=("dense", "matrix_free"), q=0.5, r=2.0, q_f=1.5, jacobian_prompts=PROMPTS, skip=2)
    again = fit_concept(plant, "tone", POSITIVE, NEGATIVE, settings)
    assert again.artifact().fingerprint == fitted.artifact().fingerprint


def test_identity_gains_need_no_jacobian(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("linearised")

    monkeypatch.setattr("steering.fit.concept.Linearisation", refuse)
    concept = fit_concept(plant, "tone", POSITIVE, NEGATIVE, FitSettings(gains=("identity",)))
    assert concept.quality["jacobian_products"] == {}
    cosine = torch.nn.functional.cosine_similarity(concept.gain()[1:], concept.direction[1:4])
    torch.testing.assert_close(cosine, torch.ones(3))
    assert Concept.from_artifact(concept.artifact()).gain().equal(concept.gain())


def test_identity_may_be_the_default_beside_a_fitted_gain(plant: Plant) -> None:
    settings = FitSettings(gains=("identity", "matrix_free"), jacobian_prompts=2)
    concept = fit_concept(plant, "tone", POSITIVE, NEGATIVE, settings)
    assert list(concept.gains) == ["matrix_free"]
    assert torch.equal(concept.gain(), concept.gain("identity"))
    assert not torch.equal(concept.gain(), concept.gain("matrix_free"))


def test_layers_are_those_asked_for(plant: Plant) -> None:
    settings = FitSettings(gains=("matrix_free",), layers=(1, 2), jacobian_prompts=2)
    concept = fit_concept(plant, "tone", POSITIVE, NEGATIVE, settings)
    assert concept.layers == (1, 2)
    assert concept.gain().any(dim=-1).tolist() == [False, True, True, False]
    assert concept.quality["jacobian_products"] == {"matrix_free": 3 * 2}
    assert concept.direction.any(dim=-1).all()


def test_few_examples_are_measured_on_themselves_and_say_so(plant: Plant) -> None:
    concept = fit_concept(plant, "tone", POSITIVE[:3], NEGATIVE[:3], FitSettings(gains=("identity",)))
    assert concept.quality["measured_on"] == "fitted"


def test_chats_are_read_at_their_answers(plant: Plant) -> None:
    def chats(answer: str) -> list[Any]:
        turns = [{"role": "user", "content": "you see ?"}, {"role": "assistant", "content": answer}]
        return [turns, [{"role": "user", "content": "you know ?"}, turns[1]]]

    settings = FitSettings(gains=("matrix_free",), jacobian_prompts=2)
    concept = fit_concept(plant, "tone", chats("yes very good"), chats("no not good"), settings)
    assert concept.direction[0].any()


def test_progress_runs_from_start_to_end(plant: Plant) -> None:
    seen: list[tuple[str, float]] = []
    settings = FitSettings(gains=("dense", "matrix_free"), jacobian_prompts=2)
    fit_concept(plant, "tone", POSITIVE, NEGATIVE, settings, lambda stage, done: seen.append((stage, done)))
    shares = [share for _, share in seen]
    assert shares == sorted(shares)
    assert seen[-1] == ("done", 1.0)
    assert [stage for stage in dict(seen) if stage != "done"] == [
        "states (positive)",
        "states (negative)",
        "prefixes",
        "gains (dense)",
        "gains (matrix_free)",
    ]


@pytest.mark.parametrize("kind", ["dense", "matrix_free"])
def test_progress_is_finer_than_a_layer(kind: Gains, plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steering.plant.jacobian.PIECE_FLOP_CPU", 0.0)
    monkeypatch.setattr("steering.plant.jacobian.LEAST_ROWS", 4)  # two rows of each of two prompts
    seen: list[float] = []
    line = Linearisation(plant, [[1, 8, 10], [1, 9, 12, 14]])
    v_LD = torch.nn.functional.normalize(torch.randn(LAYERS + 1, plant.width), dim=1)
    gains_along(line, kind, v_LD, Weights(), range(LAYERS), lambda done, of: seen.append(done / of))
    assert len(seen) > LAYERS
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


@pytest.mark.parametrize("kind", ["dense", "matrix_free"])
def test_memory_does_not_grow_with_the_depth(kind: Gains) -> None:
    """Matrices of D rows or more that are alive beside the model's, at the worst moment of a fit."""

    def most(layers: int) -> int:
        deep = Plant(tiny("llama", layers=layers))
        line = Linearisation(deep, [[1, 8, 10], [1, 9, 12, 14]])
        v_LD = torch.nn.functional.normalize(torch.randn(layers + 1, deep.width), dim=1)
        before = matrices(deep.width)
        alive: list[int] = []
        gains_along(line, kind, v_LD, Weights(), range(layers), lambda *_: alive.append(matrices(deep.width) - before))
        return max(alive)

    assert most(8) == most(3) <= (8 if kind == "dense" else 0)


def matrices(width: int) -> int:
    """Tensors (…, width, width) and larger that Python can reach; each storage once."""
    tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
    return len({t.data_ptr() for t in tensors if t.dim() > 1 and min(t.shape[-2:]) >= width})


def test_what_progress_raises_ends_the_fit(plant: Plant) -> None:
    class Cancelled(Exception):
        pass

    def cancel(stage: str, _: float) -> None:
        if stage.startswith("gains"):
            raise Cancelled

    with pytest.raises(Cancelled):
        fit_concept(plant, "tone", POSITIVE, NEGATIVE, FitSettings(jacobian_prompts=2), cancel)


@pytest.mark.parametrize(
    ("name", "positive", "negative", "param"),
    [
        ("../x", POSITIVE, NEGATIVE, "name"),
        ("x", POSITIVE[:1], NEGATIVE, "positive"),
        ("x", POSITIVE, [], "negative"),
        ("x", POSITIVE, ["a", " "], "negative[1]"),
        ("x", POSITIVE, POSITIVE, "positive"),
    ],
)
def test_what_cannot_be_fitted_is_named(
    plant: Plant, name: str, positive: list[Any], negative: list[Any], param: str
) -> None:
    with pytest.raises(SpecError) as caught:
        fit_concept(plant, name, positive, negative, FitSettings(jacobian_prompts=2))
    assert caught.value.param == param


def test_chats_need_a_template() -> None:
    plant = Plant(tiny("llama", layers=1), tiny_tokenizer(chat=False))
    chat = [[{"role": "user", "content": "yes"}]] * 2
    with pytest.raises(PlantError, match="chat template"):
        fit_concept(plant, "tone", chat, ["a", "b"])  # type: ignore[arg-type]


def test_a_fit_pauses_in_every_stage_and_what_the_pause_raises_ends_it(plant: Plant) -> None:
    stages: list[str] = ["reading"]
    paused: dict[str, int] = {}

    def pause() -> None:
        paused[stages[-1]] = paused.get(stages[-1], 0) + 1
        if len(paused) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_concept(
            plant, "tone", POSITIVE, NEGATIVE, FitSettings(jacobian_prompts=4), lambda s, _: stages.append(s), pause
        )
    # What is told is the last stage that was reported: its first pieces still run under the name of the one before.
    assert list(paused) == ["reading", "states (positive)", "states (negative)", "prefixes", "gains (dense)"]
    assert paused["reading"] > len(POSITIVE) + len(NEGATIVE)


def test_a_row_that_the_model_cannot_take_is_named() -> None:
    bare = tiny_tokenizer()
    bare.chat_template = None
    chat = [{"role": "user", "content": "the cat"}]
    with pytest.raises(PlantError) as error:
        fit_concept(Plant(tiny("llama"), bare), "tone", [*POSITIVE[:2], chat], NEGATIVE)
    assert error.value.param == "positive[2]"


def test_examples_that_fill_the_context_are_counted(plant: Plant) -> None:
    cats, others = ["the cat sat", "a good cat", "cat " * 3 * plant.context], ["a dog", "the sun"]
    concept = fit_concept(plant, "x", cats, others, FitSettings(gains=("identity",), skip=1))
    assert concept.quality["filled_context"] == 1
