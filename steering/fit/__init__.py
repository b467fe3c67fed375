"""Fitting: plant × examples → artifacts."""

from __future__ import annotations

from steering.fit.concept import FitSettings, difference_of_means, fit_concept
from steering.fit.examples import Example, read_examples

__all__ = ["Example", "FitSettings", "difference_of_means", "fit_concept", "read_examples"]
