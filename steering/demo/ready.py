"""Fit the ready concepts that ship with the embedded model, and make its ready plans (`steering.demo.plans`).

    python -m steering.demo.ready [--only NAME …] [--examples 150]

Both gains are fitted, so that a request may choose; the default is `matrix_free`. Examples come from the corpus with a
seed of their own; the prompts on which the concepts are judged (`contrast.prompts`) are not among them.

Where a concept's activations are taken matters more than the algorithm, so:

* topic and truth are averaged over the tokens of whole answers, tone and style over the second half of them, where a
  sentence's end counts for more: the next sentence is decided there;
* the language is read at the ends of sentences, refusal and compliance at the end of the prompt: where each is decided;
* of six times as many drawn examples those are kept whose answers carry their pole most clearly;
* the negative examples of a style are its opposite and, in equal part, the two other styles, else "polite" would be
  "not rude";
* refusal and compliance are best applied where they were read: `{"prompt": "last", "generation": "none"}`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from steering.concept import Concept
from steering.demo import CONCEPT_NAMES, CONCEPTS, MODEL, TOPICS
from steering.demo.contrast import POSITIONS, Example, contrast, opposite
from steering.demo.documents import POLE_OF_STYLE
from steering.demo.judges import count_style, count_tone, count_topic
from steering.fit import FitSettings, fit_concept
from steering.fit.concept import PositionRule
from steering.plant.plant import Plant

SEED = 7
EXAMPLES = 150
DRAWN = 6
"""Examples drawn for each that is kept."""
LATE = ("positive", "negative", *POLE_OF_STYLE)
"""Concepts read late in the answer, where earlier sentences have set them and the next sentence is decided."""
SETTINGS = FitSettings(gains=("matrix_free", "dense"), q=2.0, r=1.0, q_f=2.0, jacobian_prompts=16)


def examples(name: str, n: int = EXAMPLES) -> tuple[list[Example], list[Example]]:
    """`n` positive and `n` negative examples of a ready concept. Raises KeyError for an unknown name."""
    positive, negative = contrast(name, DRAWN * n, SEED)
    if name not in POLE_OF_STYLE:
        return _clearest(name, positive, n), _clearest(opposite(name) or "", negative, n)
    others = [style for style in POLE_OF_STYLE if style not in (name, opposite(name))]
    share = n // (2 * len(others))
    rest = [row for style in others for row in _clearest(style, contrast(style, DRAWN * share, SEED + 1)[0], share)]
    return _clearest(name, positive, n), _clearest(str(opposite(name)), negative, n - len(rest)) + rest


def ready(plant: Plant, name: str, n: int = EXAMPLES, settings: FitSettings = SETTINGS) -> Concept:
    """One ready concept, fitted. Raises KeyError for an unknown name."""
    positive, negative = examples(name, n)
    positions: PositionRule = "late" if name in LATE else POSITIONS[name]
    return fit_concept(plant, name, positive, negative, replace(settings, positions=positions))


def _clearest(name: str, rows: list[Example], n: int) -> list[Example]:
    """The `n` rows whose answers carry `name` most clearly; the first ones for a concept without a lexicon."""
    return sorted(rows, key=lambda row: -_clarity(name, row))[:n]


def _clarity(name: str, row: Example) -> int:
    """How many words or markers of the concept the answer holds; 0 for a concept without a lexicon."""
    text = row if isinstance(row, str) else row[-1]["content"]
    if name in ("positive", "negative"):
        return count_tone(text, name)
    if name in POLE_OF_STYLE:
        return count_style(text, name)
    return count_topic(text, name) if name in TOPICS else 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit and write the concepts and plans named on the command line, all by default."""
    from steering.demo.plans import READY_PLANS

    names = (*CONCEPT_NAMES, *READY_PLANS)
    parser = argparse.ArgumentParser(prog="python -m steering.demo.ready", description="Make the ready artifacts.")
    parser.add_argument("--only", nargs="*", default=list(names), choices=names, metavar="NAME")
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="examples of each class of a concept")
    parser.add_argument("--out", type=Path, default=CONCEPTS)
    options = parser.parse_args(arguments)
    plant = Plant.load(MODEL, dtype="float32")
    for name in options.only:
        if name in READY_PLANS:
            plan = READY_PLANS[name](plant, name)
            path, told = plan.artifact().save(options.out), f"plan of kind {plan.kind}"
        else:
            concept = ready(plant, name, options.examples)
            path, auroc = concept.artifact().save(options.out), concept.quality["auroc"]
            told = f"AUROC {auroc[1]:.2f} … {auroc[-1]:.2f}"
        print(f"{name}: {told}, {path.stat().st_size} bytes", flush=True)


if __name__ == "__main__":
    main()
