"""The ready plans of the embedded model: one for each kind, small enough to ship.

Those named after the tone are made of the answers that the concept `positive` is made of; `spanish-language` of
answers to the same requests in both languages; the rest of calibration texts that hold every tone and style.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from steering.demo import edits
from steering.demo.contrast import Example, contrast
from steering.demo.ready import SEED, examples
from steering.fit.plans import fit_plan, settings_of
from steering.plan import AdapterPlan, Plan
from steering.plan.adapter import TARGETS as ADAPTED
from steering.plant.plant import Plant

Make = Callable[[Plant, str], Plan]
TONE, LANGUAGE = ("positive", 120), ("spanish", 120)


def _of_classes(kind: str, source: tuple[str, int], /, **settings: object) -> Make:
    """A plan of two classes: of the answers of a ready concept, and its opposite."""

    def make(plant: Plant, name: str) -> Plan:
        concept, n = source
        classes = examples(concept, n) if source is TONE else contrast(concept, n, SEED)
        return fit_plan(plant, name, *classes, settings_of(kind, settings, plant))

    return make


def _of_texts(kind: str, n: int = 60, /, **settings: object) -> Make:
    """A plan of calibration texts."""
    return lambda plant, name: fit_plan(plant, name, texts(n), [], settings_of(kind, settings, plant))


def texts(n: int) -> list[Example]:
    """`n` chats with answers of every tone, style and language, in turn."""
    sources = ("positive", "polite", "spanish", "formal", "dog", "truthful")
    each = [contrast(name, -(-n // (2 * len(sources))), SEED + 2) for name in sources]
    mixed = [row for carrying, lacking in each for pair in zip(carrying, lacking, strict=True) for row in pair]
    return mixed[:n]


def _reft(plant: Plant, name: str) -> Plan:
    return edits.train_reft(plant, name, examples(*TONE)[0])


def _adapter(plant: Plant, name: str) -> Plan:
    matrices, quality = edits.train_lora(plant, examples(*TONE)[0])
    order = sorted(matrices, key=lambda place: (place[0], ADAPTED.index(place[1])))
    parts = [matrices[place] for place in order]
    return AdapterPlan(
        name=name,
        model=plant.fingerprint,
        depth=plant.depth,
        width=plant.width,
        quality=quality,
        provenance={"steps": edits.STEPS, "rows": edits.ROWS, "rate": edits.RATE, "examples": TONE[1]},
        modules=tuple(f"layers.{layer}.{target}" for layer, target in order),
        ranks=tuple(len(A) for A, _ in parts),
        inner=tuple(A.shape[1] for A, _ in parts),
        outer=tuple(len(B) for _, B in parts),
        a=torch.cat([A.flatten() for A, _ in parts]),
        b=torch.cat([B.mT.flatten() for _, B in parts]),
    )


def _act_add(plant: Plant, name: str) -> Plan:
    settings = settings_of("act_add", {}, plant)
    return fit_plan(plant, name, ["What a wonderful day, I love it"], ["What a horrible day, I hate it"], settings)


READY_PLANS: Mapping[str, Make] = {
    "tone-eigenshift": _of_classes("eigenshift", TONE, positions="late"),
    "tone-neurons": _of_classes("neurons", TONE, positions="late"),
    "tone-heads": _of_classes("heads", TONE, positions="late"),
    "tone-transport": _of_classes("transport", TONE, positions="late"),
    "tone-sae": _of_classes("sae", TONE, positions="answer", layers=(4,), features=256),
    "tone-act-add": _act_add,
    "tone-reft": _reft,
    "tone-adapter": _adapter,
    "spanish-language": _of_classes("language", LANGUAGE, features=192, steps=1500),
    "sensitive-neurons": _of_classes("neurons", TONE, method="sensitivity", source="positions"),
    "principal": _of_classes("subspace", TONE, positions="late", leading=16, trailing=32),
    "interaction": _of_texts("interaction", 40, leading=16, trailing=16),
    "sparse": _of_texts("sparsity"),
    "depth": _of_texts("layers"),
    "channels": lambda plant, name: fit_plan(plant, name, [], [], settings_of("channels", {}, plant)),
}
"""Name → how it is made."""
