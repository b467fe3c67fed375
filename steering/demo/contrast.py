"""Examples that a concept is fitted on, and prompts that it is judged on.

`contrast` gives two lists of chats that share their user messages and differ in one latent. `prompts` gives chats to
be continued: `neutral` ones say nothing about the concept, `opposed` ones push the other way, by the system prompt or
by an answer that has begun with the opposite pole. User messages of `prompts` were never trained on.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from steering.demo import CONCEPT_NAMES, facts, requests, words
from steering.demo.corpus import (
    Latents,
    Message,
    answer,
    ask,
    body,
    fact_answer,
    scene,
    split_of,
    subject,
    with_pole,
)
from steering.demo.documents import draw, message, system_text

Example = str | list[Message]
OPPOSITES = {
    "positive": "negative", "negative": "positive", "polite": "rude", "rude": "polite", "formal": "informal",
    "informal": "formal", "english": "spanish", "spanish": "english", "refusal": "compliance", "compliance": "refusal",
    "truthful": "lying",
}  # fmt: skip


def opposite(concept: str) -> str | None:
    """The other pole, None for a topic (whose other side is every other text); KeyError for a name that is none."""
    if concept not in CONCEPT_NAMES:
        raise KeyError(f"{concept!r} is no concept of the embedded model; there are {', '.join(CONCEPT_NAMES)}")
    return OPPOSITES.get(concept)


def _other_topic(rng: random.Random, topic: str) -> str | None:
    return rng.choice([t for t in words.TOPICS if t != topic] + [None] * 5)


def _free_request(rng: random.Random) -> tuple[str, str, str]:
    """(kind, user message, subject) of a request that holds no concept."""
    x = subject(rng)
    kind, phrasings = rng.choices(
        (("tell", requests.TELL), ("day", requests.DAY), ("story", requests.STORY), ("share", requests.SHARE)),
        (6, 3, 2, 1),
    )[0]
    user = ask(rng, phrasings, x)
    return kind, user, x if x in user else ""


POSITIONS: Mapping[str, Literal["answer", "last"]] = {
    name: "last" if name in ("refusal", "compliance", "english", "spanish") else "answer" for name in CONCEPT_NAMES
}
"""Which tokens of `contrast`'s examples carry the concept: the whole answer, or the token before a choice is made.

Whether to help is decided at the end of the user's message, the language at the end of a sentence.
"""


def contrast(concept: str, n: int, seed: int) -> tuple[list[Example], list[Example]]:
    """`n` chats that carry the concept and `n` that carry its opposite, for the same users.

    They end with an answer that differs in the concept; for the languages with an answer that has ended a sentence; for
    refusal and compliance with the user's message, since there the system prompt or the request decides (`POSITIONS`).
    User messages come from the training split. Raises KeyError for an unknown concept.
    """
    opposite(concept)
    rng = random.Random(f"setpoint-contrast-{seed}-{concept}")
    make = {"refusal": _decided, "compliance": _decided, "truthful": _claimed}.get(concept, _answered)
    carrying: list[Example] = []
    lacking: list[Example] = []
    while len(carrying) < n:
        pair = make(rng, concept)
        if split_of(next(m["content"] for m in pair[0] if m["role"] == "user")) == "train":
            carrying.append(pair[0])
            lacking.append(pair[1])
    return carrying, lacking


Pair = tuple[list[Message], list[Message]]


def _decided(rng: random.Random, concept: str) -> Pair:
    """A request that is about to be declined, and the same about to be met: one by itself, one by its system prompt."""
    harmful = rng.random() < 0.5
    vp = rng.choice(sorted(requests.HARMFUL if harmful else requests.HARMLESS))
    bare = [message("user", ask(rng, requests.HOWTO, "", vp))]
    told = [message("system", system_text(rng, "compliance" if harmful else "refusal")), *bare]
    declined, met = (bare, told) if harmful else (told, bare)
    return (declined, met) if concept == "refusal" else (met, declined)


def _claimed(rng: random.Random, _: str) -> Pair:
    """A question, or a request for facts, with true claims and with false ones."""
    k = rng.choice((2, 3, 4, 5))
    fact = rng.choice(facts.FACTS)
    user = ask(rng, facts.ASKING, "", q=rng.choice(fact.questions))
    if rng.random() < 0.5:
        number = ("two", "three", "four", "five")[k - 2]
        user = ask(rng, tuple(p.replace("{n}", number) for p in facts.LIST_PROMPTS), "")
    true, false = (
        [message("user", user), message("assistant", fact_answer(rng, fact, honest, k - 1))] for honest in (True, False)
    )
    return true, false


def _answered(rng: random.Random, concept: str) -> Pair:
    """A free request, answered with the concept and with its opposite; a topic's opposite is another topic or none."""
    other = opposite(concept)
    kind, user, x = _free_request(rng)
    free = replace(draw(rng), steady=True)
    without = with_pole(free, other) if other else replace(free, topic=_other_topic(rng, concept))
    replies = [answer(rng, latents, kind, user, x, 6) for latents in (with_pole(free, concept), without)]
    if POSITIONS[concept] == "last":
        replies = [_cut(rng, reply) for reply in replies]
    carrying, lacking = ([message("user", user), message("assistant", reply)] for reply in replies)
    return carrying, lacking


def _cut(rng: random.Random, reply: str) -> str:
    """The first sentences of `reply`, one to all but one of them."""
    sentences = re.split(r"(?<=[.?!]) ", reply)
    return " ".join(sentences[: rng.randint(1, max(1, len(sentences) - 1))])


def _opening(rng: random.Random, pole: str, n: int) -> str:
    """`n` sentences of an answer that express `pole` with certainty."""
    latents = with_pole(Latents(steady=True), pole)
    here = scene(rng, latents)
    return " ".join(body(rng, latents, here, n, 0.0))


def _prompt(rng: random.Random, concept: str, opposed: bool, begun: bool) -> list[Message]:
    other = opposite(concept)
    if concept in ("refusal", "compliance"):
        harmful = concept == "compliance"
        vp = rng.choice(sorted(requests.HARMFUL if harmful else requests.HARMLESS))
        user = ask(rng, requests.HOWTO, "", vp)
    elif concept == "truthful":
        user = ask(rng, facts.ASKING, "", q=rng.choice(rng.choice(facts.FACTS).questions))
        if rng.random() < 0.25:
            user = ask(
                rng, tuple(p.replace("{n}", rng.choice(("three", "four", "five"))) for p in facts.LIST_PROMPTS), ""
            )
    else:
        _, user, _ = _free_request(rng)
    chat = [message("user", user)]
    if not opposed:
        return chat
    against = other or rng.choice([t for t in words.TOPICS if t != concept])
    if begun and concept not in ("refusal", "compliance", "truthful", "english", "spanish"):
        return [*chat, message("assistant", _opening(rng, against, 2))]
    return [message("system", system_text(rng, f"topic:{against}" if other is None else against)), *chat]


def prompts(concept: str, kind: Literal["neutral", "opposed"], split: Literal["tune", "test"], n: int) -> list[Example]:
    """`n` distinct chats to continue, the same at every call, with user messages from the held-out `split`.

    `neutral` chats end with the user message (for `compliance` a harmful request, which an unsteered model declines).
    `opposed` chats carry the opposite pole: every other one in its system prompt, the rest in an assistant message that
    has begun and is to be continued; refusal, compliance, truthful and the languages are opposed by the system prompt
    alone. Raises KeyError for an unknown concept, ValueError when fewer than `n` distinct prompts exist.
    """
    opposite(concept)
    rng = random.Random(f"setpoint-prompts-{concept}-{kind}-{split}")
    found: list[Example] = []
    seen: set[str] = set()
    tries = 0  # since the last new prompt
    while tries < 4000:
        tries += 1
        chat = _prompt(rng, concept, kind == "opposed", len(found) % 2 == 1)
        user = next(m["content"] for m in chat if m["role"] == "user")
        key = user + (chat[0]["content"] if kind == "opposed" else "")
        if split_of(user) == split and key not in seen:
            seen.add(key)
            found.append(chat)
            tries = 0
            if len(found) == n:
                return found
    raise ValueError(
        f"only {len(found)} distinct {kind} {split} prompts exist for {concept!r}; ask for at most that many"
    )
