"""Fitting: plant × examples → artifacts."""

from __future__ import annotations

from steering.fit.concept import FitSettings, PositionRule, difference_of_means, encode_class, fit_concept
from steering.fit.examples import MAX_EXAMPLES, Example, checked_class, read_examples
from steering.fit.quality import warning

__all__ = [
    "MAX_EXAMPLES",
    "Example",
    "FitSettings",
    "PositionRule",
    "checked_class",
    "difference_of_means",
    "encode_class",
    "fit_concept",
    "read_examples",
    "warning",
]
