"""What sets the spread of a held projection: the regulator's price, or what each block adds after it was measured?

    e_{l+1} = (1 − g) e_l + r_l            r_l: what block l itself adds along v, which no law that read x_l can know

    python -m benchmarks.spread [--prompts 48]

Fits one concept with several prices q of the error and reports, at λ = 2 on held-out prompts, the spread of v·x over
tokens (layers 3 and up, averaged) relative to the unsteered one. Clamp measures and writes at one place: spread 0.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from steering.concept import Concept
from steering.demo import MODEL
from steering.demo.contrast import prompts
from steering.demo.ready import SETTINGS, ready
from steering.evaluation.conditions import Condition
from steering.plant.massive import Caution
from steering.plant.plant import Plant
from steering.runtime import Engine, EngineSettings, Request, Sampling

FIRST_LAYER, LAMBDA = 3, 2.0
PRICES = (0.5, 2.0, 6.0, 15.0)


@dataclass(frozen=True)
class Bench:
    """A model with one concept."""

    depth: int
    width: int
    caution: Caution
    only: Concept

    def concept(self, name: str) -> Concept:
        """The concept."""
        return self.only


def spread(plant: Plant, engine: Engine, concept: Concept, method: str, n: int) -> tuple[float, float]:
    """Standard deviation and mean of v·x in the concept's units, over tokens, averaged over layers."""
    program = Condition(concept.name, method, LAMBDA if method != "none" else 0.0).program(
        Bench(plant.depth, plant.width, plant.caution, concept)
    )
    chats = prompts(concept.name, "neutral", "test", n)
    requests = [
        Request(str(i), tuple(plant.encode(chat, open_end=True)), Sampling(max_tokens=64, temperature=0.8, seed=i))
        for i, chat in enumerate(chats)
    ]
    by_layer: dict[int, list[float]] = defaultdict(list)
    for done in engine.generate([replace(request, program=program, trace=True) for request in requests]):
        for reading in (one for token in done.trace or () for one in token):
            if reading.layer >= FIRST_LAYER:
                by_layer[reading.layer].append(reading.projection)
    values = list(by_layer.values())
    return float(np.mean([np.std(one) for one in values])), float(np.mean([np.mean(one) for one in values]))


def main() -> None:
    """Print the table and write `benchmarks/results/spread.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", nargs="+", default=["positive", "polite", "dog"])
    parser.add_argument("--prompts", type=int, default=48)
    arguments = parser.parse_args()
    plant = Plant.load(MODEL, dtype="float32")
    engine = Engine(plant, EngineSettings(max_batch=32, max_model_len=256))
    rows = []
    for name in arguments.concepts:
        for q in PRICES:
            concept = ready(plant, name, settings=replace(SETTINGS, gains=("matrix_free",), q=q, q_f=q))
            base, _ = spread(plant, engine, concept, "none", arguments.prompts)
            held, mean = spread(plant, engine, concept, "lqr matrix-free", arguments.prompts)
            rows.append({"concept": name, "q": q, "ratio": round(held / base, 3), "mean": round(mean, 3)})
            print(f"{name:9} q={q:4g}: spread {held / base:.2f} of the unsteered one, mean {mean:.2f}", flush=True)
    record = {"lambda": LAMBDA, "prompts": arguments.prompts, "model": plant.fingerprint, "rows": rows}
    path = Path(__file__).parent / "results" / "spread.json"
    path.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
