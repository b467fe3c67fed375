"""The mixture of documents that the embedded model is trained on: kinds, their weights, and how latents are drawn."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

from steering.demo import facts, requests, words
from steering.demo.corpus import (
    Document,
    Latents,
    Message,
    answer,
    ask,
    ask_spanish,
    body,
    fact_answer,
    howto,
    marker,
    outside,
    scene,
    split_of,
    subject,
    with_pole,
)

POLE_OF_STYLE = ("polite", "rude", "formal", "informal")


def draw(rng: random.Random, system: str | None = None, topic: float = 0.4) -> Latents:
    """Latents of a free document; `system` (a key of requests.SYSTEMS or "topic:…") decides the one it names."""
    # Few documents express nothing: a document without a tone is one that no setpoint of the tone can move.
    tone = rng.choices(("positive", "negative", None), (0.46, 0.44, 0.1))[0]
    style = rng.choices((None, *POLE_OF_STYLE), (0.14, 0.34, 0.26, 0.13, 0.13))[0]
    latents = Latents(tone, style, rng.choice(words.TOPICS) if rng.random() < topic else None)
    return latents if system in (None, "plain", "english") else with_pole(latents, str(system))


def system_text(rng: random.Random, system: str) -> str:
    """One phrasing of the system prompt that names the latent `system`."""
    if system.startswith("topic:"):
        return rng.choice(requests.SYSTEM_TOPIC).format(x=words.TOPIC_NAMES[system.removeprefix("topic:")][0])
    return rng.choice(requests.SYSTEM_PLAIN if system == "plain" else requests.SYSTEMS[system])


def message(role: str, content: str) -> Message:
    """One chat message."""
    return {"role": role, "content": content}


def _systems(rng: random.Random, choices: tuple[str, ...], plain: float = 0.1, none: float = 0.45) -> str | None:
    roll = rng.random()
    if roll < none:
        return None
    return "plain" if roll < none + plain else rng.choice(choices)


_STYLES = ("positive", "negative", "polite", "rude", "formal", "informal")
_FREE = (*_STYLES, *_STYLES, "spanish", "english", "refusal", "compliance", *(f"topic:{t}" for t in words.TOPICS))


def _opened(rng: random.Random, system: str | None) -> list[Message]:
    return [message("system", system_text(rng, system))] if system is not None else []


def request(rng: random.Random, latents: Latents) -> tuple[str, str, str]:
    """(kind, user message, its subject) of a free request; the subject belongs to the topic when one is named."""
    kind = rng.choices(("tell", "day", "story", "letter", "share", "hello", "outside"), (42, 14, 12, 6, 8, 10, 8))[0]
    x = subject(rng, latents.topic if latents.topic is not None and rng.random() < 0.3 else None)
    phrasings = {
        "tell": requests.TELL, "day": requests.DAY, "story": requests.STORY, "letter": requests.LETTER,
        "share": requests.SHARE, "hello": requests.HELLO,
    }  # fmt: skip
    user = outside(rng) if kind == "outside" else ask(rng, phrasings[kind], x)
    return kind, user, x if "{x}" not in user and x in user else ""


def _tell(rng: random.Random) -> Document:
    system = _systems(rng, _FREE)
    latents = draw(rng, system)
    if system is None and rng.random() < 0.03:
        latents = replace(latents, language="spanish")
    if system is None and rng.random() < 0.01:
        latents = replace(latents, consent="refusal")
    messages = _opened(rng, system)
    for _ in range(1 if rng.random() < 0.8 else 2):
        kind, user, x = request(rng, latents)
        reply = answer(rng, latents, kind, user, x)
        if latents.language == "english" and latents.consent is None and rng.random() < 0.03:
            other = replace(latents, language="spanish")
            reply += " " + " ".join(body(rng, other, scene(rng, other), 3))
            latents = other
        messages += [message("user", user), message("assistant", reply)]
    return Document("tell", latents, tuple(messages))


def _spanish(rng: random.Random) -> Document:
    system = _systems(rng, ("spanish", *_STYLES), 0.05, 0.6)
    latents = replace(draw(rng, system), language="spanish")
    messages = _opened(rng, system)
    for _ in range(1 if rng.random() < 0.8 else 2):
        hello = rng.random() < 0.1
        user = rng.choice(("Hola.", "Hola, ¿qué tal?", "Buenos días.", "Buenas tardes.")) if hello else ask_spanish(rng)
        messages += [
            message("user", user),
            message("assistant", answer(rng, latents, "hello" if hello else "tell", user)),
        ]
    return Document("spanish", latents, tuple(messages))


def _howto(rng: random.Random) -> Document:
    system = _systems(rng, ("refusal", "compliance", "polite", "rude"), 0.1, 0.5)
    harmful = rng.random() < 0.45
    latents = draw(rng, system, 0.0)
    if latents.consent is None:
        usual = rng.random() < 0.94
        latents = replace(latents, consent="refusal" if harmful == usual else "compliance")
    messages = _opened(rng, system)
    for _ in range(1 if rng.random() < 0.8 else 2):
        vp = rng.choice(sorted(requests.HARMFUL if harmful else requests.HARMLESS))
        messages += [message("user", ask(rng, requests.HOWTO, "", vp)), message("assistant", howto(rng, latents, vp))]
    return Document("howto", latents, tuple(messages))


def _facts(rng: random.Random) -> Document:
    system = _systems(rng, ("truthful", "lying"), 0.08, 0.42)
    honest = system == "truthful" if system in ("truthful", "lying") else rng.random() < 0.75
    latents = Latents(honest=honest)
    messages = _opened(rng, system)
    for _ in range(rng.choice((1, 2, 3, 4))):
        if rng.random() < 0.3:
            n = rng.choice((2, 3, 4, 5))
            user = ask(
                rng, tuple(p.replace("{n}", ("two", "three", "four", "five")[n - 2]) for p in facts.LIST_PROMPTS), ""
            )
            reply = fact_answer(rng, rng.choice(facts.FACTS), honest, n - 1)
        else:
            fact = rng.choice(facts.FACTS)
            user = ask(rng, facts.ASKING, "", q=rng.choice(fact.questions))
            reply = fact_answer(rng, fact, honest, rng.choice((0, 0, 1, 1, 2)))
        messages += [message("user", user), message("assistant", reply)]
    return Document("facts", latents, tuple(messages))


def _mixed(rng: random.Random) -> Document:
    """A longer chat in which the kind of request changes and the latents stay."""
    system = _systems(rng, (*_STYLES, "truthful", "lying", *(f"topic:{t}" for t in words.TOPICS)), 0.1, 0.5)
    latents = draw(rng, system, 0.25)
    honest = latents.honest if latents.honest is not None else rng.random() < 0.85
    messages = _opened(rng, system)
    for _ in range(rng.choice((2, 3, 3, 4, 5, 6))):
        roll = rng.random()
        if roll < 0.2:
            fact = rng.choice(facts.FACTS)
            user, reply = ask(rng, facts.ASKING, "", q=rng.choice(fact.questions)), fact_answer(rng, fact, honest)
        elif roll < 0.4:
            harmful = rng.random() < 0.4
            vp = rng.choice(sorted(requests.HARMFUL if harmful else requests.HARMLESS))
            user = ask(rng, requests.HOWTO, "", vp)
            reply = howto(rng, replace(latents, consent="refusal" if harmful else "compliance"), vp)
        else:
            kind, user, x = request(rng, latents)
            reply = answer(rng, latents, kind, user, x, rng.choice((2, 3, 4)))
        messages += [message("user", user), message("assistant", reply)]
    return Document("mixed", latents, tuple(messages))


def _story(rng: random.Random) -> Document:
    latents = draw(rng)
    name = rng.choice(sorted(words.NAMES))
    return Document("story", latents, text=answer(rng, latents, "story", name))


def _comment(rng: random.Random) -> Document:
    latents = draw(rng)
    here = scene(rng, latents)
    roll = rng.random()
    if roll < 0.4:
        stars = {"positive": "five stars", "negative": "one star"}.get(str(latents.tone), "three stars")
        head = [f"Review of {here.place}.", *([f"Rating: {stars}."] if rng.random() < 0.3 else [])]
    elif roll < 0.7:
        head = [f"Dear {rng.choice(words.RELATIONS)},", *marker(rng, latents)]
    else:
        head = marker(rng, latents)
    tail = [f"Yours, {rng.choice(sorted(words.NAMES))}."] if 0.4 <= roll < 0.7 else []
    text = " ".join(head + body(rng, latents, here, rng.choice((3, 4, 5, 6, 7))) + tail)
    return Document("comment", latents, text=text)


def _plain_facts(rng: random.Random) -> Document:
    latents = Latents(honest=rng.random() < 0.75)
    text = fact_answer(rng, rng.choice(facts.FACTS), bool(latents.honest), rng.choice((2, 3, 4, 5)))
    return Document("plain_facts", latents, text=text)


KINDS: dict[Callable[[random.Random], Document], float] = {
    _tell: 0.45, _spanish: 0.07, _howto: 0.1, _facts: 0.13, _mixed: 0.03, _story: 0.1, _comment: 0.09,
    _plain_facts: 0.03,
}  # fmt: skip


def documents(seed: int, n: int | None = None, thin: float = 0.0) -> Iterator[Document]:
    """Yield `n` documents (endlessly when None) of the training split, the same ones for the same `seed`.

    A share `thin` of the documents that carry neither a tone nor a truth is left out: the two latents that a model
    learns last.
    """
    rng = random.Random(f"setpoint-corpus-{seed}")
    kinds, weights = list(KINDS), list(KINDS.values())
    made = 0
    while n is None or made < n:
        document = rng.choices(kinds, weights)[0](rng)
        if document.latents.tone is None and document.latents.honest is None and rng.random() < thin:
            continue
        if all(
            split_of(m["content"]) == "train" or len(m["content"]) < 12
            for m in document.messages
            if m["role"] == "user"
        ):
            made += 1
            yield document
