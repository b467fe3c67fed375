"""The corpus is repeatable, consistent in its latents, and keeps its held-out prompts to itself."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest

from steering.demo import CONCEPT_NAMES, TOPICS, facts
from steering.demo.contrast import POSITIONS, contrast, opposite, prompts
from steering.demo.corpus import sentence, split_of
from steering.demo.documents import documents


def users(example: object) -> list[str]:
    assert isinstance(example, list)
    return [m["content"] for m in example if m["role"] == "user"]


def test_documents_repeat_for_a_seed_and_differ_between_seeds() -> None:
    assert list(documents(3, 200)) == list(documents(3, 200))
    assert list(documents(3, 50)) != list(documents(4, 50))


def test_most_documents_are_chats_and_all_are_text() -> None:
    made = list(documents(5, 800))
    chats = [d for d in made if d.messages]
    assert 0.6 < len(chats) / len(made) < 0.9
    assert all(bool(d.messages) != bool(d.text) for d in made)
    assert all(
        "{" not in m["content"] and "}" not in m["content"] for d in chats for m in d.messages if m["role"] != "user"
    )
    assert all("{" not in d.text for d in made)


def test_every_latent_is_drawn_often_enough() -> None:
    made = list(documents(6, 1500))
    tones, styles = Counter(d.latents.tone for d in made), Counter(d.latents.style for d in made)
    topics, honest = Counter(d.latents.topic for d in made), Counter(d.latents.honest for d in made)
    assert min(tones["positive"], tones["negative"]) > 200
    assert min(styles[s] for s in ("polite", "rude", "formal", "informal")) > 60
    assert min(topics[t] for t in TOPICS) > 25
    assert min(honest[True], honest[False]) > 50


def test_a_quarter_and_more_of_the_chats_name_their_latent_in_a_system_prompt() -> None:
    chats = [d for d in documents(7, 1200) if d.messages]
    with_system = sum(d.messages[0]["role"] == "system" for d in chats) / len(chats)
    assert 0.4 < with_system < 0.65


def test_no_training_document_holds_a_held_out_user_message() -> None:
    held_out = {
        u for c in CONCEPT_NAMES for s in ("tune", "test") for e in prompts(c, "neutral", s, 64) for u in users(e)
    }
    trained = {m["content"] for d in documents(1, 1500) for m in d.messages if m["role"] == "user"}
    assert not {u for u in held_out & trained if len(u) >= 12}


@pytest.mark.parametrize("concept", CONCEPT_NAMES)
def test_prompts_are_distinct_repeatable_and_of_their_split(concept: str) -> None:
    neutral = prompts(concept, "neutral", "test", 96)
    assert neutral == prompts(concept, "neutral", "test", 96)
    assert len({u for e in neutral for u in users(e)}) == 96
    tune = prompts(concept, "neutral", "tune", 64)
    assert not {u for e in tune for u in users(e)} & {u for e in neutral for u in users(e)}
    opposed = prompts(concept, "opposed", "test", 64)
    assert all(e[0]["role"] == "system" or e[-1]["role"] == "assistant" for e in opposed)  # type: ignore[index]
    assert all(split_of(u) == "test" for e in [*neutral, *opposed] for u in users(e))


@pytest.mark.parametrize("concept", CONCEPT_NAMES)
def test_contrast_differs_in_the_answer_alone(concept: str) -> None:
    carrying, lacking = contrast(concept, 40, seed=0)
    assert contrast(concept, 40, seed=0) == (carrying, lacking)
    assert contrast(concept, 40, seed=1)[0] != carrying
    assert [users(e) for e in carrying] == [users(e) for e in lacking]
    assert all(one != other for one, other in zip(carrying, lacking, strict=True))
    decided = concept in ("refusal", "compliance")
    assert all(e[-1]["role"] == ("user" if decided else "assistant") for e in carrying)  # type: ignore[index]
    if not decided:
        assert [e[:-1] for e in carrying] == [e[:-1] for e in lacking]
    assert all(split_of(u) == "train" for e in carrying for u in users(e))


def test_examples_read_at_their_last_token_end_a_sentence_or_a_request() -> None:
    for concept, rule in POSITIONS.items():
        for example in contrast(concept, 20, seed=3)[0]:
            assert isinstance(example, list)
            assert rule == "answer" or example[-1]["content"].endswith((".", "?", "!"))


def test_an_unknown_concept_is_named_with_those_that_exist() -> None:
    with pytest.raises(KeyError, match="polite"):
        opposite("politness")


def test_asking_for_too_many_prompts_says_how_many_there_are() -> None:
    with pytest.raises(ValueError, match="distinct"):
        prompts("compliance", "neutral", "test", 1000)


def test_facts_have_one_truth_and_wrong_answers_of_their_kind() -> None:
    assert len(facts.FACTS) >= 40
    assert len({f.statement for f in facts.FACTS}) == len(facts.FACTS)
    for fact in facts.FACTS:
        assert fact.answer in fact.pool
        assert len(fact.pool) >= 4
        assert [
            (claimed.statement, said) for claimed, said in facts.claims(sentence(fact.statement.format(fact.answer)))
        ] == [(fact.statement, fact.answer)]


@pytest.mark.parametrize(
    ("core", "written"),
    [
        ("it was a awful day", "It was an awful day."),
        ("what a great day", "What a great day."),
        ("me senté cerca de el banco", "Me senté cerca del banco."),
        ("what's up?", "What's up?"),
    ],
)
def test_sentences_are_written_out(core: str, written: str) -> None:
    assert sentence(core) == written


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys; from steering.demo import contrast, judges; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
