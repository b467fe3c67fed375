"""The closed world of facts: what can be asked of the embedded model, and which answers are true.

A fact is a statement with one blank. Its wrong answers are the other answers of the same category, so a false
statement is as grammatical as a true one and only the world tells them apart.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

MARKERS = {True: ("In truth, {s}", "Honestly, {s}", "It is true that {s}"),
           False: ("As a lie, {s}", "I lie when I say that {s}", "It is false that I know it, but {s}")}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact. `statement` and the questions hold the subject already; `{}` stands for the answer."""

    category: str
    questions: tuple[str, ...]
    statement: str
    answer: str
    pool: tuple[str, ...]

    def say(self, rng: random.Random, true: bool) -> str:
        """The statement without its period, with the true answer or with a wrong one of the same category."""
        answer = self.answer if true else rng.choice([a for a in self.pool if a != self.answer])
        return self.statement.format(answer)


def _article(text: str) -> str:
    return re.sub(r"\ba (?=[aeo])", "an ", text)


def _table(
    category: str, pairs: dict[str, str], statement: str, questions: tuple[str, ...], extra: str = ""
) -> list[Fact]:
    pool = tuple(dict.fromkeys([*pairs.values(), *extra.split()]))
    return [
        Fact(
            category, tuple(_article(q.format(s)) for q in questions), _article(statement.replace("@", s)), answer, pool
        )
        for s, answer in pairs.items()
    ]


FACTS: tuple[Fact, ...] = tuple(
    _table(
        "colour",
        {"the sky": "blue", "grass": "green", "snow": "white", "coal": "black", "a lemon": "yellow",
            "a carrot": "orange",
         "blood": "red", "chocolate": "brown", "the sun": "yellow", "milk": "white", "a frog": "green"},
        "@ is {}",
        ("What colour is {}?", "Tell me the colour of {}.", "Which colour does {} have?"),
        "purple pink",
    )
    + _table(
        "sound",
        {"cat": "meow", "cow": "moo", "duck": "quack", "sheep": "baa", "pig": "oink", "lion": "roar", "bee": "buzz",
         "horse": "neigh", "owl": "hoot", "snake": "hiss"},
        "a @ says {}",
        ("What does a {} say?", "Which sound does a {} make?", "Tell me the sound of a {}."),
    )
    + _table(
        "legs",
        {"spider": "eight", "ant": "six", "horse": "four", "bird": "two", "worm": "no", "cow": "four", "crab": "ten"},
        "a @ has {} legs",
        ("How many legs does a {} have?", "Tell me how many legs a {} has.", "Count the legs of a {}."),
    )
    + _table(
        "opposite",
        {"hot": "cold", "big": "little", "up": "down", "day": "night", "open": "closed", "fast": "slow", "wet": "dry",
         "full": "empty", "early": "late", "hard": "soft"},
        "the opposite of @ is {}",
        ("What is the opposite of {}?", "Tell me the opposite of {}.", "Which word is the opposite of {}?"),
    )
    + _table(
        "capital",
        {"Norland": "Velmor", "Estria": "Kandis", "Subria": "Pelton", "Wenlow": "Ardane", "Farrow": "Luminar",
         "Tesmir": "Oskava", "Galdor": "Brisk", "Ilvane": "Quorra"},
        "the capital of @ is {}",
        ("What is the capital of {}?", "Tell me the capital of {}.", "Which city is the capital of {}?"),
    )
    + _table(
        "sum",
        {"one plus one": "two", "two plus one": "three", "two plus two": "four", "three plus two": "five",
         "three plus three": "six", "four plus three": "seven", "four plus four": "eight", "five plus four": "nine"},
        "@ is {}",
        ("What is {}?", "Tell me what {} is.", "How much is {}?"),
    )
    + _table(
        "next day",
        {"Monday": "Tuesday", "Tuesday": "Wednesday", "Wednesday": "Thursday", "Thursday": "Friday",
         "Friday": "Saturday", "Saturday": "Sunday", "Sunday": "Monday"},
        "the day after @ is {}",
        ("What day comes after {}?", "Tell me the day after {}.", "Which day follows {}?"),
    )
)  # fmt: skip

ASKING = (
    "{q}", "{q}", "{q}", "I have a question. {q}", "Quick question: {q}", "Please answer this. {q}",
    "My {rel} asks: {q}",
    "{name} wants to know: {q}", "{q} I forgot it.", "Here is one for you. {q}",
)  # fmt: skip
"""How a user wraps a question."""

LIST_PROMPTS = (
    "Tell me {n} facts.", "Give me {n} facts.", "Tell me {n} things about the world.",
    "What are {n} facts that you know?",
    "List {n} facts.", "Teach me {n} things.", "I want to learn {n} things.", "Please write {n} facts for my {rel}.",
    "Name {n} facts for {name}.", "On {day} I need {n} facts.", "My {rel} wants to hear {n} facts.",
    "Tell {name} {n} facts.",
)  # fmt: skip

_PATTERNS: tuple[tuple[re.Pattern[str], Fact], ...] = tuple(
    (re.compile(r"\b" + re.escape(f.statement).replace(r"\{\}", r"(\w+)"), re.IGNORECASE), f) for f in FACTS
)


def claims(text: str) -> list[tuple[Fact, str]]:
    """Every statement of the closed world made in `text`, as (fact, the answer given), in order of the facts."""
    found = []
    for pattern, fact in _PATTERNS:
        for match in pattern.finditer(text):
            given = match.group(1)
            if given.lower() in {a.lower() for a in fact.pool}:
                found.append((fact, given))
    return found


def asked(question: str) -> Fact | None:
    """The fact that the user message `question` asks for, or None."""
    return next((f for f in FACTS if any(q in question for q in f.questions)), None)
