"""The native engine: many requests, each with its own program, in one batch on one machine.

    request → scheduler (rows, chunks) → scope (who is steered where) → runner (one forward pass) → sampler → events

It receives compiled programs and knows no method, no store and no wire format.
"""

from __future__ import annotations

from steering.runtime.desk import AnyEngine
from steering.runtime.engine import Engine
from steering.runtime.grammar import Grammar, GrammarCompiler
from steering.runtime.receipt import Receipt
from steering.runtime.request import Delta, Event, Finished, LayerReading, Request, Sampling, TokenLogprob, Usage
from steering.runtime.settings import EngineSettings, Stats

__all__ = [
    "AnyEngine",
    "Delta",
    "Engine",
    "EngineSettings",
    "Event",
    "Finished",
    "Grammar",
    "GrammarCompiler",
    "LayerReading",
    "Receipt",
    "Request",
    "Sampling",
    "Stats",
    "TokenLogprob",
    "Usage",
]
