"""Words, lifts and stages: each against a computation of its own, and a plan that moves the embedded model's words."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from steering.demo import MODEL
from steering.demo.contrast import contrast
from steering.errors import SpecError
from steering.fit.language import LanguageSettings, fit_language
from steering.fit.lift import ALPHAS, LAMBDAS, lift_slopes, moved, next_words, prompts_of, vocabulary
from steering.methods import Language
from steering.plan import LanguagePlan
from steering.plant.jacobian import Linearisation
from steering.plant.plant import Plant
from steering.types import Site
from tests.fit.test_concept import NEGATIVE, POSITIVE
from tests.plants import VOCAB, WIDTH, prompts, tiny, tiny_tokenizer

SETTINGS = LanguageSettings(
    skip=2, features=24, steps=60, batch=32, layers=(0, 1, 2), candidates=8, prompts=2, dominance=0.8
)


@pytest.fixture(scope="module")
def plant() -> Plant:
    return Plant(tiny("llama"), tiny_tokenizer())


@pytest.fixture(scope="module")
def fitted(plant: Plant) -> LanguagePlan:
    return fit_language(plant, "tongue", POSITIVE, NEGATIVE, SETTINGS)


# Words


def test_words_are_those_of_one_class() -> None:
    rows = [([1, 5, 5, 7], [3]), ([1, 7, 7, 9], [3])]
    others = [([1, 6, 6, 7], [3]), ([1, 6, 8, 9], [3])]
    words = vocabulary(rows, others, 12, 0.7)
    assert (words.target.tolist(), words.source.tolist()) == ([5, 7], [6])  # 8 stands once, 9 and 1 in both
    assert vocabulary(rows, others, 12, 0.8).target.tolist() == [5]


def test_languages_without_words_of_their_own_are_refused() -> None:
    rows = [([1, 5, 5, 7, 7], [3])]
    for pair, side in (
        ((rows, [([1, 5, 7], [2])]), "positive"),
        (([([1, 5, 7], [2])], [([5, 5, 7, 7, 9], [3])]), "positive"),
    ):
        with pytest.raises(SpecError) as caught:
            vocabulary(*pair, 12, 0.9)
        assert caught.value.param == side
    with pytest.raises(SpecError) as caught:
        vocabulary([([1, 5, 5], [2])], [([1, 7], [1])], 12, 0.9)
    assert caught.value.param == "negative"


def test_prompts_end_in_the_middle_of_what_is_read() -> None:
    rows = [(list(range(10, 20)), range(4, 10)), (list(range(30, 36)), [5]), ([7, 8], [0])]
    assert prompts_of(rows, 2) == [list(range(10, 18)), list(range(30, 36))]
    assert len(prompts_of(rows, 9)) == 3


# Lifts


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_the_next_words_are_the_model_s(family: str) -> None:
    plant = Plant(tiny(family), tiny_tokenizer())
    ids = prompts(2)
    linear = Linearisation(plant, ids, max_context=64)
    for n, prompt in enumerate(ids):
        with torch.no_grad():
            wanted = plant.model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        torch.testing.assert_close(next_words(plant, linear.states_PLD[n, -1:])[0], wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("first", [0, 1, 3])
def test_a_lift_is_that_of_a_hooked_pass_over_the_whole_prompt(plant: Plant, first: int) -> None:
    ids = prompts(2)
    words = vocabulary([([5, 5, 6, 6], [0])], [([7, 7, 8, 8], [0])], VOCAB, 0.9)
    gain = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(4))
    found = lift_slopes(plant, Linearisation(plant, ids, max_context=64), words, first, gain)
    site = Site("resid_pre", first) if first < plant.depth else Site("resid_post", plant.depth - 1)

    def margin(prompt: list[int], add: torch.Tensor) -> float:
        shell = plant.shell()

        def hook(x: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            x[0, -1] += add
            return x

        plant.tap(shell, site, hook)
        with torch.no_grad():
            p = shell(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        return float(p[words.target].sum() - p[words.source].sum())

    for j, row in enumerate(gain):
        slopes = [
            sum((margin(p, alpha * row) - margin(p, 0 * row)) / alpha for p in ids) / len(ids) for alpha in ALPHAS
        ]
        middle = sorted(slopes)[2:4]  # six values: the median is between the two in the middle
        assert float(found[j]) == pytest.approx(sum(middle) / 2, rel=1e-2, abs=1e-5)


def test_a_move_is_that_of_hooks_at_every_block_of_the_window(plant: Plant, fitted: LanguagePlan) -> None:
    ids = prompts(2)
    words = vocabulary([([5, 5, 6, 6], [0])], [([7, 7, 8, 8], [0])], VOCAB, 0.9)
    for control in (False, True):
        found = moved(plant, Linearisation(plant, ids, max_context=64), words, fitted, control=control)

        def margin(prompt: list[int], lam: float, control: bool = control) -> float:
            shell = plant.shell()
            for row, layer in enumerate(fitted.layers):
                law = lam * fitted.law(row, suppress=0.0, control=control)

                def hook(x: torch.Tensor, law: Any = law) -> torch.Tensor:
                    x = x.clone()
                    x[0, -1:] = law(x[0, -1:], x[0, -1:])
                    return x

                plant.tap(shell, Site(fitted.tap, layer), hook)
            with torch.no_grad():
                p = shell(torch.tensor([prompt])).logits[0, -1:].softmax(-1)
            return float(words.margin(p))

        for lam, gain in zip(LAMBDAS, found, strict=True):
            wanted = sum(margin(p, lam) - margin(p, 0.0) for p in ids) / len(ids)
            assert gain == pytest.approx(wanted, rel=1e-2, abs=1e-5)


# The fit


def test_a_fit_is_whole_and_carries_every_stage_s_figures(plant: Plant) -> None:
    stages: list[tuple[str, float]] = []
    pauses: list[int] = []
    plan = fit_language(
        plant, "t", POSITIVE, NEGATIVE, SETTINGS, lambda s, f: stages.append((s, f)), lambda: pauses.append(1)
    )
    assert LanguagePlan.from_artifact(plan.artifact()).layers == plan.layers
    assert stages[-1] == ("done", 1.0)
    assert [f for _, f in stages] == sorted(f for _, f in stages)
    assert pauses
    q = plan.quality
    n = len(q["layers"])
    for name in ("kept", "lift", "rank", "entropy_rank", "eigengap", "mass", "stability", "overlap", "auroc", "shift"):
        assert len(q[name]) == n, name
    assert tuple(q["window"]) == plan.layers
    assert set(q["random"]) == {"words_moved"}
    assert len(q["words_moved"]) == len(q["random"]["words_moved"]) == len(q["strengths"]) == 4
    assert all(0 < kept <= 8 for kept in q["kept"])
    assert all(lift > 0 for lift in q["lift"])
    assert all(r <= min(g, 12) for r, g in zip(q["rank"], q["eigengap"], strict=True))
    assert q["autoencoders"]["layers"] == [0, 1, 2]


def test_the_plan_is_tried_on_prompts_that_chose_no_feature(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the prompts on which features were chosen for what they do, they would beat random ones by chance."""
    seen: list[list[list[int]]] = []

    def noted(rows: Any, count: int) -> list[list[int]]:
        seen.append([ids for ids, _ in rows])
        return prompts_of(rows, count)

    monkeypatch.setattr("steering.fit.language.prompts_of", noted)
    fit_language(plant, "t", POSITIVE, NEGATIVE, SETTINGS)
    chosen_on, tried_on = seen
    ids = [plant.encode(text) for text in NEGATIVE]
    assert tried_on == ids[::5]
    assert chosen_on == [row for n, row in enumerate(ids) if n % 5]


def test_the_same_fit_twice_is_the_same_plan(plant: Plant, fitted: LanguagePlan) -> None:
    again = fit_language(plant, "tongue", POSITIVE, NEGATIVE, SETTINGS)
    assert again.artifact().fingerprint == fitted.artifact().fingerprint


def test_the_move_lies_in_the_kept_features_and_the_control_writes_as_much(fitted: LanguagePlan) -> None:
    for row, count in enumerate(fitted.counts):
        t, s = fitted.target[row], fitted.source[row]
        assert not bool(t[count:].any() or s[count:].any() or fitted.probe[row, count:].any())
        assert float(t.norm()) == pytest.approx(1, abs=1e-4)
        own, random = (fitted.law(row, suppress=0, control=control).gain.norm() for control in (False, True))
        assert float(own) == pytest.approx(float(random), rel=1e-3)
        assert fitted.number[row, :count].unique().numel() == count


def test_classes_that_are_not_paired_are_refused(plant: Plant) -> None:
    with pytest.raises(SpecError, match="one for each positive one") as caught:
        fit_language(plant, "t", POSITIVE, NEGATIVE[:-1], SETTINGS)
    assert caught.value.param == "negative"


def test_classes_in_which_no_feature_lifts_are_refused(plant: Plant) -> None:
    with pytest.raises(SpecError) as caught:
        fit_language(plant, "t", POSITIVE, POSITIVE, SETTINGS)
    assert caught.value.param == "positive"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"candidates": 0}, "candidates"),
        ({"candidates": 128}, "candidates"),
        ({"prompts": 0}, "prompts"),
        ({"context": 1}, "context"),
        ({"dominance": 0.5}, "dominance"),
        ({"dominance": float("nan")}, "dominance"),
        ({"tap": "mlp_out"}, "tap"),
        ({"features": 1}, "features"),
    ],
)
def test_impossible_settings_are_refused_by_name(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(SpecError) as caught:
        LanguageSettings(**changes)
    assert caught.value.param == param


def test_the_middle_half_is_the_default() -> None:
    assert LanguageSettings().chosen(32) == tuple(range(8, 24))
    assert LanguageSettings().chosen(8) == (2, 3, 4, 5)
    assert LanguageSettings().chosen(1) == (0,)


def test_on_the_embedded_model_spanish_words_become_likelier_than_with_random_features() -> None:
    """At every English position that is continued, through the whole window at once."""
    plant = Plant.load(MODEL)
    spanish, english = contrast("spanish", 30, 0)
    settings = LanguageSettings(
        features=128, steps=150, batch=128, positions="answer", layers=(3, 4), candidates=20, prompts=4
    )
    plan = fit_language(plant, "spanish", spanish, english, settings)
    assert max(plan.quality["words_moved"]) > max(plan.quality["random"]["words_moved"]) + 0.1
    assert "warning" not in plan.quality

    class Bench:
        depth, width = plant.depth, plant.width

        def plan(self, name: str, kind: type) -> LanguagePlan:
            return plan

    unseen = contrast("spanish", 6, 7)
    words = vocabulary(
        *[[(plant.encode(row), [0]) for row in rows] for rows in (spanish, english)], plant.vocab, settings.dominance
    )

    def share(method: Language | None) -> float:
        shell, total = plant.shell(), 0.0
        for route, law in method.compile(Bench()).laws.items() if method else ():  # type: ignore[arg-type]
            plant.tap(shell, route.write, lambda x, law=law: law(x[0], x[0])[None])  # type: ignore[misc]
        for row in unseen[1]:
            with torch.no_grad():
                p = shell(torch.tensor([plant.encode(row)])).logits[0, 8:-1].softmax(-1)
            total += float(words.margin(p).mean())
        return total / len(unseen[1])

    plain, steered, control = (
        share(m)
        for m in (None, Language(plan="spanish", strength=8.0), Language(plan="spanish", strength=8.0, control=True))
    )
    assert steered > max(plain, control) + 0.1
