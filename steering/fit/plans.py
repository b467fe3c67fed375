"""The kinds of plan that are fitted from positive and negative examples, for the server and the command line alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from steering.errors import SpecError
from steering.fit.concept import FitSettings, Progress
from steering.fit.eigenshift import EigenshiftSettings, fit_eigenshift
from steering.fit.examples import Example
from steering.fit.quality import USABLE_AUROC
from steering.fit.subspace import SubspaceSettings, fit_subspace
from steering.plan import Plan
from steering.plant.capture import Pause
from steering.plant.plant import Plant

PlanSettings = EigenshiftSettings | SubspaceSettings
PLAN_SETTINGS: Mapping[str, type[PlanSettings]] = {"eigenshift": EigenshiftSettings, "subspace": SubspaceSettings}
"""Kind → how it is fitted."""


def settings_of(kind: str, given: Mapping[str, Any], depth: int | None = None) -> FitSettings | PlanSettings:
    """The settings of a fit of `kind`, `concept` or a plan's, from those fields that a caller gave.

    With `depth`, the layers are checked against a model of so many blocks. Raises SpecError or ControlError that names
    the field, also for one that this kind does not have.
    """
    cls: Any = FitSettings if kind == "concept" else PLAN_SETTINGS.get(kind)
    if cls is None:
        raise SpecError("kind", expected=f"concept, {' or '.join(PLAN_SETTINGS)}", got=kind)
    known = [field.name for field in fields(cls)]
    for name in given:
        if name not in known:
            raise SpecError(name, expected=f"a setting of kind {kind!r}, which are {', '.join(known)}")
    settings: FitSettings | PlanSettings = cls(**given)
    if depth is not None and isinstance(settings, FitSettings):
        settings.controlled(depth)
    elif depth is not None and isinstance(settings, SubspaceSettings):
        settings.chosen(depth)
    return settings


def fit_plan(
    plant: Plant,
    name: str,
    positive: Sequence[Example],
    negative: Sequence[Example],
    settings: PlanSettings,
    progress: Progress | None = None,
    pause: Pause | None = None,
) -> Plan:
    """Fit the plan whose kind the settings are of. Raises what `fit_eigenshift` and `fit_subspace` raise."""
    if isinstance(settings, EigenshiftSettings):
        return fit_eigenshift(plant, name, positive, negative, settings, progress, pause)
    return fit_subspace(plant, name, positive, negative, settings, progress, pause)


def plan_warning(quality: Mapping[str, Any]) -> str | None:
    """One sentence about the gravest doubt that a plan's figures leave, None where they leave none."""
    random = quality.get("random")
    if random is None:
        return None
    if quality["auroc"] < USABLE_AUROC:
        return (
            f"The chosen components do not tell the classes apart (AUROC {quality['auroc']:.2f} on "
            f"{quality['measured_on']} examples): give more examples, and clearer ones."
        )
    if quality["separation"] <= random["separation"]:
        return (
            f"The chosen components separate the classes no better than random ones ({quality['separation']:.2f} "
            f"against {random['separation']:.2f}): choose by `separation`, or give more examples."
        )
    if quality["measured_on"] != "held-out":
        return "The figures are of the very examples that were fitted: give ten or more of each class."
    return None
