"""The kinds of plan that can be fitted, for the server and the command line alike. A new one is one entry."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from steering.errors import SpecError
from steering.fit.act_add import ActAddSettings, fit_act_add
from steering.fit.channels import ChannelsSettings, fit_channels
from steering.fit.concept import FitSettings, Progress, encode_class
from steering.fit.eigenshift import EigenshiftSettings, fit_eigenshift
from steering.fit.examples import Example, checked_class
from steering.fit.heads import HeadsSettings, fit_heads
from steering.fit.interaction import InteractionSettings, fit_interaction
from steering.fit.language import LanguageSettings, fit_language
from steering.fit.layers import LayersSettings, fit_layers
from steering.fit.neurons import NeuronsSettings, fit_neurons
from steering.fit.quality import FITTED_ONLY, USABLE_AUROC
from steering.fit.sae import SaeSettings, fit_sae
from steering.fit.sparsity import SparsitySettings, fit_sparsity
from steering.fit.subspace import SubspaceSettings, fit_subspace
from steering.fit.transport import TransportSettings, fit_transport
from steering.plan import Plan
from steering.plant.capture import Pause
from steering.plant.plant import Plant

Fit = Callable[
    [Plant, str, Sequence[Example], Sequence[Example], Any, Progress | None, Pause | None],
    Plan,
]
"""plant, name, positive, negative, settings, progress, pause → plan."""


@dataclass(frozen=True)
class Fitter:
    """How one kind of plan is made.

    settings: a frozen dataclass whose construction checks every field but those that depend on the model; those its
    method `for_model(plant)` checks, where it has one. least: the fewest rows of the positive and the negative class;
    0 for a class that must not be given. most: the most rows of a class, None for any number. is_paired: whether row i
    of one class belongs to row i of the other. A kind with one class takes its calibration texts as the positive one.
    """

    settings: type[Any]
    fit: Fit
    least: tuple[int, int] = (2, 2)
    most: int | None = None
    is_paired: bool = False

    def __post_init__(self) -> None:
        # As `steering.registry.register` does: pydantic reads the docstrings under the fields where HTTP meets them.
        self.settings.__pydantic_config__ = {"extra": "forbid", "use_attribute_docstrings": True}


FITS: Mapping[str, Fitter] = {
    "eigenshift": Fitter(EigenshiftSettings, fit_eigenshift),
    "subspace": Fitter(SubspaceSettings, fit_subspace),
    "neurons": Fitter(NeuronsSettings, fit_neurons),
    "heads": Fitter(HeadsSettings, fit_heads),
    "act_add": Fitter(ActAddSettings, fit_act_add, least=(1, 1), most=1),
    "sae": Fitter(SaeSettings, fit_sae),
    "language": Fitter(LanguageSettings, fit_language, is_paired=True),
    "sparsity": Fitter(SparsitySettings, fit_sparsity, (2, 0)),
    "layers": Fitter(LayersSettings, fit_layers, (2, 0)),
    "transport": Fitter(TransportSettings, fit_transport),
    "interaction": Fitter(InteractionSettings, fit_interaction, (2, 0)),
    "channels": Fitter(ChannelsSettings, fit_channels, (0, 0)),
}
"""Kind → how it is made."""
SEEDS = 2**63
"""A seed lies between −SEEDS and SEEDS: torch takes no larger ones."""


def settings_of(kind: str, given: Mapping[str, Any], plant: Plant | None = None) -> Any:
    """The settings of a fit of `kind`, `concept` or a plan's, from those fields that a caller gave.

    With `plant`, what depends on the model is checked too. Raises SpecError or ControlError that names the field, also
    for one that this kind does not have.
    """
    cls: Any = FitSettings if kind == "concept" else FITS[kind].settings if kind in FITS else None
    if cls is None:
        raise SpecError("kind", expected=f"concept, {' or '.join(FITS)}", got=kind)
    known = [field.name for field in fields(cls)]
    for name in given:
        if name not in known:
            raise SpecError(name, expected=f"a setting of kind {kind!r}, which are {', '.join(known) or 'none'}")
    settings = cls(**given)
    seed = getattr(settings, "seed", 0)
    if not -SEEDS <= seed < SEEDS:
        raise SpecError("seed", expected="a whole number of 64 bits", got=seed)
    if plant is not None:
        if isinstance(settings, FitSettings):
            settings.controlled(plant.depth)
        elif hasattr(settings, "for_model"):
            settings.for_model(plant)
    return settings


def checked_rows(
    plant: Plant, kind: str, settings: Any, positive: Sequence[Example], negative: Sequence[Example]
) -> tuple[list[Example], list[Example]]:
    """The two classes after all that can be wrong with them was looked for. Raises SpecError that names the row."""
    fitter = FITS.get(kind)
    least, most = ((2, 2), None) if fitter is None else (fitter.least, fitter.most)
    reading = settings if isinstance(settings, FitSettings) else None
    if reading is None:
        reading = settings.reading() if hasattr(settings, "reading") else FitSettings()
    found: list[list[Example]] = []
    for side, rows, fewest in zip(("positive", "negative"), (positive, negative), least, strict=True):
        if fewest == 0:
            if rows:
                raise SpecError(side, expected=f"no examples here for a fit of kind {kind!r}", got=len(rows))
            found.append([])
            continue
        checked = checked_class(side, rows, least=fewest)
        if most is not None and len(rows) > most:
            raise SpecError(side, expected=f"at most {most} examples for a fit of kind {kind!r}", got=len(rows))
        encode_class(plant, side, checked, reading)
        found.append(checked)
    if fitter is not None and fitter.is_paired and len(found[0]) != len(found[1]):
        expected = f"{len(found[0])} examples, one for each positive one"
        raise SpecError("negative", expected=expected, got=len(found[1]))
    return found[0], found[1]


def fit_plan(
    plant: Plant,
    name: str,
    positive: Sequence[Example],
    negative: Sequence[Example],
    settings: Any,
    progress: Progress | None = None,
    pause: Pause | None = None,
) -> Plan:
    """Fit the plan whose kind the settings are of. Raises what the kind's own fit raises."""
    plant.require_whole()
    fitter = next(fitter for fitter in FITS.values() if isinstance(settings, fitter.settings))
    return fitter.fit(plant, name, positive, negative, settings, progress, pause)


def plan_warning(quality: Mapping[str, Any]) -> str | None:
    """One sentence about the gravest doubt that a plan's figures leave, None where they leave none.

    A fit that knows its own doubts leaves a sentence under `warning`.
    """
    if (own := quality.get("warning")) is not None:
        return str(own)
    random = quality.get("random")
    if random is None or "separation" not in quality:
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
        return FITTED_ONLY
    return None
