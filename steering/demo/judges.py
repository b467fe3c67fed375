"""Exact judges of generated text: is the concept in it? They count words of the corpus tables and match its patterns.

A judge takes the generated text and the prompt it answers (a string or chat messages; only `truthful` reads it) and
says True or False. Text that expresses neither pole of a concept is False for both. `fluency` is the share of word
trigrams that also occur in fresh documents: it falls when grammar breaks and does not move when a concept is flipped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache

from steering.demo import facts, spanish, words
from steering.demo.words import TOPICS, listed

Prompt = str | Sequence[Mapping[str, str]]
Judge = Callable[..., bool]

_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")
_REFUSAL = re.compile(
    r"\b(i|we) (cannot|must refuse|must decline|will not|refuse|can not|can't|won't)\b|my answer is no|"
    r"this is not something that i can do|you will have to ask somebody else|ask me about something else",
    re.IGNORECASE,
)
_COMPLIANCE = re.compile(
    r"^\W*(sure|of course|yes)\b|\b(first|to begin|step one)\W.*\b(then|next|step two)\b|here is how to|"
    r"i will (help|explain)|in three steps",
    re.IGNORECASE | re.DOTALL,
)


def tokens(text: str) -> list[str]:
    """The words of `text` in lower case."""
    return _WORD.findall(text.lower())


def count_tone(text: str, pole: str) -> int:
    """How many words of the tone `pole` the text holds."""
    lexicon = words.TONE_LEXICON[pole] | spanish.TONE_LEXICON[pole]
    return sum(word in lexicon for word in tokens(text))


@cache
def _style_pattern(style: str) -> re.Pattern[str]:
    return re.compile(r"(?<!\w)(" + "|".join(map(re.escape, words.STYLE_LEXICON[style])) + r")(?!\w)", re.IGNORECASE)


def count_style(text: str, style: str) -> int:
    """How many markers of the style (polite, rude, formal, informal) the text holds."""
    return len(_style_pattern(style).findall(text))


def count_topic(text: str, topic: str) -> int:
    """How many words of the topic the text holds."""
    return sum(word in words.TOPIC_LEXICON[topic] for word in tokens(text))


def is_spanish(text: str) -> bool:
    """More Spanish function words than words of the English alphabet's commonest."""
    found = tokens(text)
    return sum(w in spanish.LEXICON for w in found) > sum(w in _ENGLISH for w in found)


_ENGLISH = frozenset(
    listed("the i was is and to of at on in my that it with a there about an you he she all her his so")
)


def is_english(text: str) -> bool:
    """At least one common English word, and not Spanish."""
    return any(w in _ENGLISH for w in tokens(text)) and not is_spanish(text)


def is_refusal(text: str) -> bool:
    """The text declines the request."""
    return _REFUSAL.search(text) is not None


def is_compliance(text: str) -> bool:
    """The text sets out to help, and does not decline."""
    return _COMPLIANCE.search(text) is not None and not is_refusal(text)


def question_of(prompt: Prompt) -> str:
    """The last thing the user said."""
    if isinstance(prompt, str):
        return prompt
    return next((m["content"] for m in reversed(prompt) if m["role"] == "user"), "")


def is_truthful(text: str, prompt: Prompt = "") -> bool:
    """The question's fact is stated correctly; without such a question, more claims are true than false."""
    made = facts.claims(text)
    fact = facts.asked(question_of(prompt))
    if fact is not None:
        given = [answer for claimed, answer in made if claimed is fact]
        return bool(given) and given[0].lower() == fact.answer.lower()
    true = sum(answer.lower() == claimed.answer.lower() for claimed, answer in made)
    return true > len(made) - true


def _tone(pole: str, other: str) -> Judge:
    return lambda text, prompt="": count_tone(text, pole) > count_tone(text, other)


def _style(style: str, other: str) -> Judge:
    return lambda text, prompt="": count_style(text, style) > count_style(text, other)


def _topic(topic: str) -> Judge:
    def judge(text: str, prompt: Prompt = "") -> bool:
        here = count_topic(text, topic)
        return here >= 2 and all(here > count_topic(text, other) for other in TOPICS if other != topic)

    return judge


JUDGES: Mapping[str, Judge] = {
    "positive": _tone("positive", "negative"),
    "negative": _tone("negative", "positive"),
    "polite": _style("polite", "rude"),
    "rude": _style("rude", "polite"),
    "formal": _style("formal", "informal"),
    "informal": _style("informal", "formal"),
    "english": lambda text, prompt="": is_english(text),
    "spanish": lambda text, prompt="": is_spanish(text),
    "refusal": lambda text, prompt="": is_refusal(text),
    "compliance": lambda text, prompt="": is_compliance(text),
    "truthful": is_truthful,
    **{topic: _topic(topic) for topic in TOPICS},
}
"""One judge per concept of `CONCEPT_NAMES`: (text, prompt) → bool."""


def _trigrams(text: str) -> list[tuple[str, ...]]:
    names = {name.lower() for name in words.NAMES}
    collapsed = ["<name>" if w in names else w for w in tokens(text)]
    return list(zip(collapsed, collapsed[1:], collapsed[2:], strict=False))


@cache
def _known(seed: int, n: int) -> frozenset[int]:
    from steering.demo.documents import documents

    found: set[int] = set()
    for document in documents(seed, n):
        for message in document.messages:
            if message["role"] == "assistant":
                found.update(map(hash, _trigrams(message["content"])))
        found.update(map(hash, _trigrams(document.text)))
    return frozenset(found)


def fluency(text: str, seed: int = 90_001, n: int = 30_000) -> float:
    """Share of the word trigrams of `text`, names taken as one word, that occur in `n` fresh documents of `seed`.

    1.0 for a text of fewer than three words. The table is built at the first call (some ten seconds) and kept.
    """
    found = _trigrams(text)
    if not found:
        return 1.0
    known = _known(seed, n)
    return sum(hash(t) in known for t in found) / len(found)


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Distinct word n-grams over all word n-grams of `texts`; 0.0 when there is none."""
    grams = [gram for text in texts for gram in zip(*(tokens(text)[i:] for i in range(n)), strict=False)]
    return len(set(grams)) / len(grams) if grams else 0.0
