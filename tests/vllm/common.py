"""What the tests of the vLLM engine have in common: the embedded model, its concepts, requests."""

from __future__ import annotations

from functools import cache
from typing import Any

from steering import Finished, Plant, Program, Request, Sampling, Shelf, Store, compile_program
from steering.demo import CONCEPTS, MODEL
from steering.registry import REGISTRY


@cache
def plant() -> Plant:
    """The embedded model."""
    return Plant.load(MODEL)


@cache
def shelf() -> Shelf:
    """Its ready concepts and plans."""
    own = plant()
    return Shelf(Store(CONCEPTS), model=own.fingerprint, depth=own.depth, width=own.width, caution=own.caution)


def program(kind: str = "lqr", **fields: Any) -> Program:
    """One intervention; of `lqr` towards "positive" if nothing else is said."""
    if kind == "lqr":
        fields = {"concept": "positive", "setpoint": 1.5} | fields
    make: Any = REGISTRY[kind]
    return compile_program([make(**fields)], shelf())


def chat(text: str = "Tell me about dogs.") -> tuple[int, ...]:
    """A prompt."""
    return tuple(plant().encode([{"role": "user", "content": text}]))


def long_chat() -> tuple[int, ...]:
    """A prompt of several blocks."""
    return chat("The dog and the cat went to the park and it rained all day long. " * 6)


def request(name: str, prompt: tuple[int, ...] | None = None, own: Program | None = None, **fields: Any) -> Request:
    """A greedy request of 16 tokens if nothing else is said."""
    more = {key: fields.pop(key) for key in ("trace", "cache_salt") if key in fields}
    sampling = Sampling(**{"max_tokens": 16, "temperature": 0.0} | fields)
    return Request(name, prompt or chat(), sampling, own or Program(), **more)


def told(end: Finished) -> dict[str, Any]:
    """What must be equal on both engines, to the last character."""
    return {
        "reason": end.reason,
        "text": end.text,
        "tokens": end.tokens,
        "stop_reason": end.stop_reason,
        "usage": (end.usage.prompt, end.usage.completion),
        "error": None if end.error is None else (type(end.error), end.error.message, end.error.param),
    }
