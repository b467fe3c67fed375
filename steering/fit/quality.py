"""What to tell a user of a fit's figures, where they promise little."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

USABLE_AUROC = 0.7
"""Below it a direction hardly tells the classes apart."""
FITTED_ONLY = "The figures are of the very examples that were fitted: give ten or more of each class."
"""The doubt about a plan whose examples are too few to hold any out."""
LIKE_HALVES = 0.3
"""Cosine below which the directions of two halves of the examples have little in common."""


def warning(quality: Mapping[str, Any]) -> str | None:
    """One sentence about the gravest doubt that the figures of `fit_concept` leave, None where they leave none."""
    best, alike = max(quality["auroc"]), max(quality["split_half_cosine"])
    if best < USABLE_AUROC:
        return (
            f"No layer tells the classes apart (best AUROC {best:.2f} on {quality['measured_on']} examples): give more "
            "examples, and clearer ones."
        )
    if alike < LIKE_HALVES:
        return (
            f"Two halves of the examples point different ways (cosine {alike:.2f} at best): give more examples, which "
            "differ in the concept alone."
        )
    if quality["measured_on"] != "held-out":
        return (
            "The figures are of the very examples that were fitted, where any direction looks good: give ten or more "
            "of each class."
        )
    if filled := quality.get("filled_context", 0):
        return (
            f"{filled} examples fill the model's context: of what is longer only the end was read; give shorter ones."
        )
    return None
