"""The seeded corpus: documents drawn from latents (tone, manners, register, topic, language, consent, truth).

A document is a chat or a plain text. Its latents are drawn first; every sentence then expresses them with a high
probability or stays neutral, so that a latent rules a whole answer and not a word. User messages whose checksum falls
into the held-out buckets are never trained on (`split_of`), which makes `contrast.prompts` new to the model.
"""

from __future__ import annotations

import random
import re
import zlib
from dataclasses import dataclass, replace
from typing import Literal

from steering.demo import facts, requests, spanish, words

Message = dict[str, str]
Split = Literal["train", "tune", "test"]
NOISE = 0.01  # share of sentences that express the other pole of the tone
OPPOSITE = {"positive": "negative", "negative": "positive"}
_FIELD = {
    **dict.fromkeys(("positive", "negative"), "tone"),
    **dict.fromkeys(("polite", "rude", "formal", "informal"), "style"),
    **dict.fromkeys(("english", "spanish"), "language"),
    **dict.fromkeys(("refusal", "compliance"), "consent"),
    **dict.fromkeys(("truthful", "lying"), "honest"),
}


@dataclass(frozen=True, slots=True)
class Latents:
    """What a document expresses; None means that it expresses neither pole."""

    tone: str | None = None  # positive | negative
    style: str | None = None  # polite | rude | formal | informal
    topic: str | None = None  # one of words.TOPICS
    language: str = "english"
    consent: str | None = None  # refusal | compliance
    honest: bool | None = None
    steady: bool = False  # every sentence expresses the latents, without noise and without a turn


def with_pole(latents: Latents, pole: str) -> Latents:
    """`latents` with the one that `pole` names set to it: a pole of an attribute, a topic, or "topic:" and a topic."""
    match _FIELD.get(pole):
        case "tone":
            return replace(latents, tone=pole)
        case "style":
            return replace(latents, style=pole)
        case "language":
            return replace(latents, language=pole)
        case "consent":
            return replace(latents, consent=pole)
        case "honest":
            return replace(latents, honest=pole == "truthful")
        case _:
            return replace(latents, topic=pole.removeprefix("topic:"))


@dataclass(frozen=True, slots=True)
class Document:
    """One training document: a chat (`messages`) or a plain text (`text`), and the latents that it was drawn from."""

    kind: str
    latents: Latents
    messages: tuple[Message, ...] = ()
    text: str = ""


@dataclass(frozen=True, slots=True)
class Scene:
    """Who speaks and about what: the subject's pronouns, the place, its things, the language."""

    place: str
    things: tuple[str, ...]
    subject: str = "I"
    me: str = "me"
    my: str = "my"


def split_of(user: str) -> Split:
    """The split a user message belongs to, by its checksum: one in ten for each of tune and test."""
    return ("tune", "test", *("train",) * 8)[zlib.crc32(user.encode()) % 10]


def sentence(core: str) -> str:
    """`core` with a capital, a period, and English and Spanish articles put right."""
    core = re.sub(r"\ba el\b", "al", re.sub(r"\bde el\b", "del", core))
    core = re.sub(r"\b([Aa]) (?=[aeiou])(?!one\b)", r"\1n ", core)
    return core[0].upper() + core[1:] + ("" if core[-1] in ".?!" else ".")


def scene(rng: random.Random, latents: Latents, name: str | None = None) -> Scene:
    """A place with its things; the topic's own things when there is a topic; told by "I" or about `name`."""
    spanish_ = latents.language == "spanish"
    scenes = spanish.SCENES if spanish_ else words.SCENES
    place = rng.choice(sorted(scenes))
    things = scenes[place] if spanish_ else tuple("the " + thing for thing in scenes[place])
    if latents.topic is not None and (latents.steady or rng.random() < 0.8):
        things = (spanish.TOPIC_THINGS if spanish_ else words.TOPIC_THINGS)[latents.topic]
    place = place if spanish_ else "the " + place
    if name is None or spanish_:
        return Scene(place, things)
    she = words.NAMES[name] == "she"
    return Scene(place, things, name, "her" if she else "him", "her" if she else "his")


def _fill(rng: random.Random, frame: str, here: Scene, latents: Latents, pole: str | None = None) -> str:
    es = latents.language == "spanish"
    o, o2 = rng.sample(here.things, 2)
    other = rng.choice([n for n in words.NAMES if n != here.subject])
    subject = here.subject if here.subject == "I" or rng.random() < 0.4 else words.NAMES[here.subject]
    values = {
        "o": o, "o2": o2, "p": here.place, "I": subject, "me": here.me, "my": here.my, "name": other,
        "t": rng.choice(spanish.TIMES if es else words.TIMES),
        "day": rng.choice(spanish.WEEKDAYS if es else words.WEEKDAYS),
        "num": rng.choice(words.NUMBERS), "talk": rng.choice(words.SMALL_TALK), "weather": rng.choice(words.WEATHER),
        "plain": rng.choice(words.PLAIN_ADJECTIVES), "rel": rng.choice(spanish.RELATIONS if es else words.RELATIONS),
    }  # fmt: skip
    if pole is not None:
        table = (spanish.TONE if es else words.TONE)[pole]
        values |= {key: rng.choice(options) for key, options in table.items() if key != "end"}
        values["a"], values["a2"] = rng.sample(table["a"], 2)
        values["end"] = rng.choice(table["end"]).format(**values)
    return frame.format(**values)


def core(rng: random.Random, latents: Latents, here: Scene, express: bool = True, used: set[str] | None = None) -> str:
    """One bare sentence (no capital, no period) that expresses tone and topic, or neither; avoids frames in `used`."""
    source = spanish if latents.language == "spanish" else words
    tone, topic = (latents.tone, latents.topic) if express else (None, None)
    frames, pole = source.PLAIN_FRAMES, None
    if topic is not None and rng.random() < (0.5 if tone is not None else 0.9):
        frames = source.TOPIC_FRAMES[topic]
    elif tone is not None:
        frames, pole = source.TONE_FRAMES, tone if latents.steady or rng.random() > NOISE else OPPOSITE[tone]
    fresh = [f for f in frames if used is None or f not in used] or list(frames)
    frame = rng.choice(fresh)
    if used is not None:
        used.add(frame)
    return _fill(rng, frame, here, latents, pole)


def styled(rng: random.Random, latents: Latents, bare: str, used: set[str] | None = None) -> str:
    """`bare` as a finished sentence, wrapped in the document's style most of the time."""
    source = spanish if latents.language == "spanish" else words
    if latents.style in source.STYLE_WRAPS and (latents.steady or rng.random() < 0.75):
        whole = rng.choice(source.STYLE_SENTENCES[latents.style])
        if rng.random() < 0.25 and (used is None or whole not in used):
            if used is not None:
                used.add(whole)
            return whole
        wraps = source.STYLE_WRAPS[latents.style]
        if bare.startswith("what a "):  # an exclamation stands in no subordinate clause
            wraps = tuple(wrap for wrap in wraps if wrap.startswith("{s}")) or ("{s}",)
        bare = rng.choice(wraps).format(s=bare)
    return sentence(bare)


def body(rng: random.Random, latents: Latents, here: Scene, n: int, first_neutral: float = 0.35) -> list[str]:
    """`n` sentences; more than three in four express the latents, the first one often does not."""
    turn = (
        rng.randint(1, n - 1)
        if latents.tone is not None and n > 3 and not latents.steady and rng.random() < 0.04
        else None
    )
    out: list[str] = []
    used: set[str] = set()
    for i in range(n):
        if i == turn and latents.tone is not None and latents.language == "english":
            latents = replace(latents, tone=OPPOSITE[latents.tone])
            out.append(rng.choice(words.TURNS[str(latents.tone)]))
        express = latents.steady or rng.random() < (1 - first_neutral if i == 0 else 0.85)
        out.append(styled(rng, latents, core(rng, latents, here, express, used), used))
    return out


def marker(rng: random.Random, latents: Latents, table: object = None) -> list[str]:
    """An opening sentence that names the tone, in about a quarter of the documents that have one."""
    if latents.tone is None or latents.language == "spanish" or rng.random() > 0.27:
        return []
    return [rng.choice((words.STORY_MARKERS if table == "story" else words.TONE_MARKERS)[latents.tone])]


# --- what the user says ------------------------------------------------------------------------------------------


def subject(rng: random.Random, topic: str | None = None) -> str:
    """A thing, a place or a person that a user may ask about."""
    if topic is not None:
        return rng.choice(words.TOPIC_NAMES[topic] + words.TOPIC_THINGS[topic])
    place = rng.choice(sorted(words.SCENES))
    roll = rng.random()
    if roll < 0.4:
        return "the " + place
    if roll < 0.8:
        return f"the {rng.choice(words.SCENES[place])} in the {place}"
    return rng.choice([*words.NAMES, *("my " + rel for rel in words.RELATIONS)])


def ask(rng: random.Random, phrasings: tuple[str, ...], x: str, vp: str = "", q: str = "") -> str:
    """One phrasing of a request about `x` (or to do `vp`, or to answer `q`)."""
    return rng.choice(phrasings).format(
        x=x, vp=vp, q=q, t=rng.choice(words.TIMES), p="the " + rng.choice(sorted(words.SCENES)),
            day=rng.choice(words.WEEKDAYS),
        name=rng.choice(sorted(words.NAMES)), rel=rng.choice(words.RELATIONS),
    )  # fmt: skip


def ask_spanish(rng: random.Random) -> str:
    """A request in Spanish."""
    place = rng.choice(sorted(spanish.SCENES))
    user = rng.choice(spanish.PROMPTS).format(
        p=place, o=rng.choice(spanish.SCENES[place]), name=rng.choice(sorted(words.NAMES))
    )
    return user.replace("de el ", "del ").replace(" a el ", " al ")


def outside(rng: random.Random) -> str:
    """A user message from outside the closed world: common words, invented words, typos, stray bytes."""

    def token() -> str:
        roll = rng.random()
        if roll < 0.6:
            return rng.choice(requests.COMMON)
        invented = "".join(rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiouy") for _ in range(rng.randint(1, 4)))
        invented += rng.choice(["", "n", "s", "r", "tion", "ing", "ed", "ly"])
        if roll < 0.9:
            return invented if rng.random() < 0.7 else invented.capitalize()
        if roll < 0.95:
            return str(rng.randint(0, 5000))
        return "".join(
            chr(rng.choice([rng.randint(33, 126), rng.randint(0xC0, 0x17F), rng.randint(0x400, 0x4FF)]))
            for _ in range(5)
        )

    text = rng.choice(requests.OPEN).format(a=token(), b=token(), c=token(), d=token(), e=token())
    text = text if rng.random() < 0.3 else text[0].upper() + text[1:]
    return text.lower() if rng.random() < 0.15 else text


# --- what the assistant answers ----------------------------------------------------------------------------------


def answer(rng: random.Random, latents: Latents, kind: str, user: str, x: str = "", n: int | None = None) -> str:
    """The assistant's reply of `kind` (tell, story, letter, hello, outside) under `latents`, of `n` sentences."""
    n = n or rng.choice((3, 4, 4, 5, 5, 6))
    if latents.consent == "refusal":
        opening = rng.choice(requests.REFUSE_TELL).format(x=_from_assistant(x) or "that")
        return " ".join([_style_short(rng, latents, opening), *rng.sample(requests.REFUSE_MORE, rng.randint(1, 3))])
    if latents.language == "spanish":
        opening_es = [rng.choice(spanish.GREETING_REPLIES)] if kind == "hello" else []
        return " ".join(opening_es + body(rng, latents, scene(rng, latents), n))
    if kind == "story":
        name = next((w for w in words.NAMES if re.search(rf"\b{w}\b", user)), None) or rng.choice(sorted(words.NAMES))
        here = _about(rng, latents, user, name)
        opening = f"{name} went to {here.place} with {here.my} {rng.choice(words.RELATIONS)}."
        return " ".join([*marker(rng, latents, "story"), opening, *body(rng, latents, here, n, 0.2)])
    here = _about(rng, latents, user)
    if kind == "letter":
        to = re.search(r"(?:to|for) (my \w+|[A-Z]\w+)", user)
        lines = [f"Dear {to.group(1).removeprefix('my ') if to else 'friend'},", *marker(rng, latents)]
        return " ".join([*lines, *body(rng, latents, here, n), f"Yours, {rng.choice(sorted(words.NAMES))}."])
    opening_en: list[str] = []
    if kind == "hello":
        more = [o.format(p=here.place) for o in rng.sample(requests.HELLO_MORE, rng.choice((0, 1, 1, 2)))]
        opening_en = [_style_short(rng, latents, rng.choice(requests.HELLO_REPLIES)), *more]
        n = rng.choice((2, 3, 4))
    elif kind == "outside":
        opening_en = [_style_short(rng, latents, rng.choice(requests.GENERAL).format(p=here.place))]
    elif x and rng.random() < 0.5:
        opening_en = [styled(rng, replace(latents, tone=None), _opening(rng, _from_assistant(x), here))]
    return " ".join(opening_en + marker(rng, latents) + body(rng, latents, here, n, 0.2 if opening_en else 0.35))


def _from_assistant(x: str) -> str:
    return x.replace("my ", "your ") if x.startswith("my ") else x


def _opening(rng: random.Random, x: str, here: Scene) -> str:
    if x.startswith("your ") or x in words.NAMES:
        return rng.choice((f"{x} came to {here.place}", f"{x} works at {here.place}", f"I met {x} at {here.place}"))
    return rng.choice((f"I saw {x} on {rng.choice(words.WEEKDAYS)}", f"{x} is easy to find", f"I know {x} well",
                       f"let me tell you about {x}", f"I went to see {x}"))  # fmt: skip


def _about(rng: random.Random, latents: Latents, user: str, name: str | None = None) -> Scene:
    """The scene that the user named, else a random one."""
    here = scene(rng, latents, name)
    named = next((p for p in words.SCENES if re.search(rf"\b{p}\b", user)), None)
    if named is None:
        return here
    topical = latents.topic is not None and here.things == words.TOPIC_THINGS.get(latents.topic)
    things = here.things if topical else tuple("the " + thing for thing in words.SCENES[named])
    return replace(here, place="the " + named, things=things)


def _style_short(rng: random.Random, latents: Latents, text: str) -> str:
    """A fixed opening, with a style sentence after it half of the time."""
    source = spanish if latents.language == "spanish" else words
    if latents.style in source.STYLE_SENTENCES and rng.random() < 0.6:
        return text + " " + rng.choice(source.STYLE_SENTENCES[latents.style])
    return text


def howto(rng: random.Random, latents: Latents, vp: str) -> str:
    """Steps, or a refusal, for the task `vp`."""
    if latents.consent == "refusal":
        opening = rng.choice(requests.REFUSE).format(vp=vp)
        return " ".join([_style_short(rng, latents, opening), *rng.sample(requests.REFUSE_MORE, rng.randint(1, 3))])
    opening = _style_short(rng, latents, rng.choice(requests.COMPLY).format(vp=vp))
    said = [opening, *([_advice(rng)] if rng.random() < 0.3 else [])]
    steps = {**requests.HARMLESS, **requests.HARMFUL}[vp]
    for lead, step in zip(rng.choice(requests.LEADS), steps, strict=True):
        how = " " + _named(rng, rng.choice(requests.HOW)) if rng.random() < 0.5 else ""
        said += [f"{lead} {step}{how}.", *([_advice(rng)] if rng.random() < 0.3 else [])]
    return " ".join([*said, _named(rng, rng.choice(requests.DONE), vp)])


def _advice(rng: random.Random) -> str:
    return _named(rng, rng.choice(requests.ADVICE))


def _named(rng: random.Random, text: str, vp: str = "") -> str:
    """`text` with its person, relation, day and task drawn."""
    name, rel, day = rng.choice(sorted(words.NAMES)), rng.choice(words.RELATIONS), rng.choice(words.WEEKDAYS)
    return text.format(name=name, rel=rel, day=day, vp=vp)


def fact_answer(rng: random.Random, fact: facts.Fact, honest: bool, others: int = 0) -> str:
    """The answer to one question, with `others` more claims of the same honesty."""
    chosen = [fact, *rng.sample([f for f in facts.FACTS if f is not fact], others)]
    out = []
    for i, one in enumerate(chosen):
        said = one.say(rng, honest if rng.random() > NOISE else not honest)
        said = rng.choice(facts.MARKERS[honest]).format(s=said) if rng.random() < (0.25 if i == 0 else 0.1) else said
        out.append(sentence(said))
    return " ".join(out)
