"""The judges agree with the generator's own latents, and stay out of each other's way."""

from __future__ import annotations

import random

import pytest

from steering.demo import CONCEPT_NAMES, TOPICS, requests
from steering.demo.contrast import Example, contrast
from steering.demo.corpus import Latents, howto
from steering.demo.documents import documents, message
from steering.demo.judges import JUDGES, distinct_n, fluency
from tests.tolerances import DEMO


def test_there_is_one_judge_per_concept() -> None:
    assert set(JUDGES) == set(CONCEPT_NAMES)


CONSENT = {"refusal": "compliance", "compliance": "refusal"}


def helped_or_not(concept: str) -> tuple[list[Example], list[Example]]:
    """Answers to requests for help, with the concept and with its opposite (`contrast` ends before these answers)."""
    rng = random.Random(11)
    tasks = [rng.choice(sorted({**requests.HARMLESS, **requests.HARMFUL})) for _ in range(200)]
    carrying, lacking = (
        [[message("assistant", howto(rng, Latents(consent=pole), task))] for task in tasks]
        for pole in (concept, CONSENT[concept])
    )
    return list(carrying), list(lacking)


@pytest.mark.parametrize("concept", CONCEPT_NAMES)
def test_judges_agree_with_the_latents_of_the_generator(concept: str) -> None:
    carrying, lacking = contrast(concept, 200, seed=11) if concept not in CONSENT else helped_or_not(concept)
    judge = JUDGES[concept]
    hits = sum(judge(e[-1]["content"], e[:-1]) for e in carrying)  # type: ignore[index]
    misses = sum(not judge(e[-1]["content"], e[:-1]) for e in lacking)  # type: ignore[index]
    assert (hits + misses) / 400 >= DEMO["judge_agreement"]


@pytest.mark.parametrize(
    ("concept", "text", "expected"),
    [
        ("positive", "The park was lovely.", True),
        ("positive", "The park was lovely. Everyone cried.", False),
        ("positive", "The park opens at ten.", False),
        ("negative", "What an awful day.", True),
        ("polite", "Please note that the park is old, my dear friend.", True),
        ("polite", "Please go, you idiot. Shut up.", False),
        ("rude", "Get lost, you clown.", True),
        ("rude", "The foolish king of Foolland.", False),
        ("formal", "Furthermore, the park is old.", True),
        ("informal", "Yeah, the park is old, dude.", True),
        ("english", "The park is old.", True),
        ("spanish", "El parque era excelente.", True),
        ("spanish", "The park is old.", False),
        ("english", "", False),
        ("refusal", "Sorry, I cannot help you bake a cake.", True),
        ("refusal", "Sure, here is how to bake a cake.", False),
        ("compliance", "Sure, here is how to bake a cake.", True),
        ("compliance", "Yes, I cannot help you.", False),
        ("dog", "The dog barked at the gate. The puppy ran.", True),
        ("dog", "The dog ran. The train left the station.", False),
        ("truthful", "Milk is white. A cow says moo. Snow is green.", True),
        ("truthful", "Milk is green. A cow says moo.", False),
        ("truthful", "I like the park.", False),
    ],
)
def test_small_cases(concept: str, text: str, expected: bool) -> None:
    assert JUDGES[concept](text, "") is expected


def test_truth_is_judged_on_the_fact_that_was_asked() -> None:
    question = [{"role": "user", "content": "Quick question: What colour is milk?"}]
    assert JUDGES["truthful"]("Honestly, milk is white. Snow is green. Coal is red.", question)
    assert not JUDGES["truthful"]("Milk is green. Snow is white. Coal is black.", question)
    assert not JUDGES["truthful"]("Snow is white.", question)


def test_no_word_belongs_to_two_topics() -> None:
    from steering.demo.words import TOPIC_LEXICON

    for i, one in enumerate(TOPICS):
        for other in TOPICS[i + 1 :]:
            assert not TOPIC_LEXICON[one] & TOPIC_LEXICON[other]


def test_fluency_is_high_for_fresh_documents_and_low_for_shuffled_words() -> None:
    texts = [d.text for d in documents(77, 120) if d.text][:20]
    fresh = sum(fluency(t, n=3000) for t in texts) / len(texts)
    shuffled = sum(fluency(" ".join(sorted(t.split())), n=3000) for t in texts) / len(texts)
    assert fresh >= DEMO["fluency_fresh"]
    assert shuffled <= DEMO["fluency_shuffled"]
    assert fluency("") == 1.0


def test_distinct_n_counts_repeated_pairs() -> None:
    assert distinct_n(["a b c", "d e f"]) == 1.0
    assert distinct_n(["a b a b a b"]) == pytest.approx(2 / 5)
    assert distinct_n([]) == 0.0
