"""Fit the ready concepts that ship with the embedded model.

    python -m steering.demo.ready [--only NAME …] [--examples 150]

Both gains are fitted, so that a request may choose; the default is `matrix_free`. Examples come from the corpus with a
seed of their own; the prompts on which the concepts are judged (`contrast.prompts`) are not among them.

Where a concept's activations are taken matters more than the algorithm, so:

* topic, language and truth are averaged over the tokens of whole answers, tone and style over the second half of them,
  where a sentence's end counts twice: the next sentence is decided there;
* of six times as many drawn examples those are kept whose answers carry their pole most clearly;
* the negative examples of a style are its opposite and, in equal part, the two other styles, else "polite" would be
  "not rude";
* refusal and compliance are decided before the first word, so they are read at the prompt's last token, on harmful
  requests (which the model refuses) against harmless ones. They are best applied there too:
  `{"prompt": "last", "generation": "none"}`.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from steering.concept import Concept
from steering.demo import CONCEPT_NAMES, CONCEPTS, MODEL, TOPICS, requests
from steering.demo.contrast import Example, contrast, opposite
from steering.demo.corpus import ask, split_of
from steering.demo.documents import POLE_OF_STYLE, message
from steering.demo.judges import count_style, count_tone, count_topic
from steering.fit import FitSettings, fit_concept
from steering.plant.plant import Plant

SEED = 7
EXAMPLES = 150
DRAWN = 6
"""Examples drawn for each that is kept."""
CONSENT = ("refusal", "compliance")
"""Concepts read at the prompt's last token."""
LATE = ("positive", "negative", *POLE_OF_STYLE)
"""Concepts read late in the answer, where earlier sentences have set them and the next sentence is decided."""
SETTINGS = FitSettings(gains=("matrix_free", "dense"), q=2.0, r=1.0, q_f=2.0, jacobian_prompts=16)


def examples(name: str, n: int = EXAMPLES) -> tuple[list[Example], list[Example]]:
    """`n` positive and `n` negative examples of a ready concept. Raises KeyError for an unknown name."""
    if name in CONSENT:
        harmful, harmless = _users(requests.HARMFUL, n), _users(requests.HARMLESS, n)
        return (harmful, harmless) if name == "refusal" else (harmless, harmful)
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
    return fit_concept(plant, name, positive, negative, replace(settings, positions="late" if name in LATE else "auto"))


def _clearest(name: str, rows: list[Example], n: int) -> list[Example]:
    """The `n` rows whose answers carry `name` most clearly; the first ones for a concept without a lexicon."""
    return sorted(rows, key=lambda row: -_clarity(name, row))[:n]


def _users(tasks: Collection[str], n: int) -> list[Example]:
    """`n` chats of the training split that ask for one of the tasks and are not answered yet."""
    rng = random.Random(f"setpoint-ready-{SEED}-{len(tasks)}")
    found: list[Example] = []
    while len(found) < n:
        user = ask(rng, requests.HOWTO, "", rng.choice(sorted(tasks)))
        if split_of(user) == "train":
            found.append([message("user", user)])
    return found


def _clarity(name: str, row: Example) -> int:
    """How many words or markers of the concept the answer holds; 0 for a concept without a lexicon."""
    text = row if isinstance(row, str) else row[-1]["content"]
    if name in ("positive", "negative"):
        return count_tone(text, name)
    if name in POLE_OF_STYLE:
        return count_style(text, name)
    return count_topic(text, name) if name in TOPICS else 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit and write the concepts named on the command line, all by default."""
    parser = argparse.ArgumentParser(prog="python -m steering.demo.ready", description="Fit the ready concepts.")
    parser.add_argument("--only", nargs="*", default=list(CONCEPT_NAMES), choices=CONCEPT_NAMES, metavar="NAME")
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="examples of each class")
    parser.add_argument("--out", type=Path, default=CONCEPTS)
    options = parser.parse_args(arguments)
    plant = Plant.load(MODEL, dtype="float32")
    for name in options.only:
        concept = ready(plant, name, options.examples)
        path = concept.artifact().save(options.out)
        auroc = concept.quality["auroc"]
        print(f"{name}: AUROC {auroc[1]:.2f} … {auroc[-1]:.2f}, {path.stat().st_size} bytes", flush=True)


if __name__ == "__main__":
    main()
