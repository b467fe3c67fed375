"""`setpoint fit`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli.common import (
    AsJson,
    Device,
    Dtype,
    Model,
    Quantization,
    StoreFolder,
    cleanly,
    print_json,
    print_table,
    progress_bar,
    quietly,
    store_place,
)

if TYPE_CHECKING:
    from steering import Artifact, Store


@cleanly
def fit(
    name: Annotated[str, typer.Argument(help="Name of the concept or plan.", show_default=False)],
    positive: Annotated[
        Path | None,
        typer.Option(
            envvar="SETPOINT_POSITIVE",
            help="Examples, or a plan's calibration texts: one a line, or JSONL with `text` or `messages`.",
        ),
    ] = None,
    negative: Annotated[Path | None, typer.Option(envvar="SETPOINT_NEGATIVE", help="Examples of the opposite.")] = None,
    model: Model = None,
    store: StoreFolder = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantization: Quantization = "none",
    kind: Annotated[str, typer.Option(envvar="SETPOINT_KIND", help="concept, or the kind of a plan.")] = "concept",
    gains: Annotated[
        list[str] | None,
        typer.Option(
            envvar="SETPOINT_GAINS",
            help="dense, matrix_free or identity; the first is the default.",
            show_default="dense",
        ),
    ] = None,
    q: Annotated[float, typer.Option(envvar="SETPOINT_Q", help="Price of the error.")] = 1.0,
    r: Annotated[float, typer.Option(envvar="SETPOINT_R", help="Price of the control.")] = 1.0,
    q_f: Annotated[float, typer.Option(envvar="SETPOINT_Q_F", help="Price of the last error.")] = 1.0,
    jacobian_prompts: Annotated[
        int, typer.Option(envvar="SETPOINT_JACOBIAN_PROMPTS", help="Examples along which the model is linearised.")
    ] = 16,
    positions: Annotated[
        str, typer.Option(envvar="SETPOINT_POSITIONS", help="Tokens to average: auto, answer, late, last or all.")
    ] = "auto",
    layers: Annotated[
        str | None,
        typer.Option(
            envvar="SETPOINT_LAYERS", help="Controlled layers, as 3-7 or 3,4,5.", show_default="all but the first"
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            envvar="SETPOINT_SET",
            help="A setting of the plan as name=value, its value in JSON or plain text. May be repeated.",
            show_default="the kind's own",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Fit a concept, or a plan, and put it into the store."""
    quietly(model)
    from server.host import load_plant, open_store
    from steering import fit_concept, read_examples
    from steering.fit import FitSettings, warning
    from steering.fit.plans import checked_rows, fit_plan, plan_warning, settings_of

    target = open_store(store_place(store))
    target.require_own(name)
    target.place.look()  # before minutes of fitting
    asked: dict[str, Any] = {
        "gains": tuple(gains) if gains else None,
        "q": q,
        "r": r,
        "q_f": q_f,
        "jacobian_prompts": jacobian_prompts,
        "positions": positions,
        "layers": _layers(layers),
    }
    default = FitSettings()
    # What is left at its default is not asked for: a plan has no gains and no prices.
    given = {n: v for n, v in asked.items() if v not in (None, getattr(default, n, None))} | _settings(setting or [])
    settings = settings_of(kind, given)
    examples = [[] if file is None else read_examples(file) for file in (positive, negative)]

    with progress_bar("loading the model") as report:
        plant = load_plant(model, device, dtype, quantization)
        settings_of(kind, given, plant)
        checked = checked_rows(plant, kind, settings, *examples)
        made: Artifact
        if isinstance(settings, FitSettings):
            made = fit_concept(plant, name, *checked, settings, report).artifact()
        else:
            made = fit_plan(plant, name, *checked, settings, report).artifact()
    path = _kept(target, made)
    quality = dict(made.body["quality"])
    doubt = warning(quality) if kind == "concept" else plan_warning(quality)
    if doubt is not None:
        typer.echo(f"Warning: {doubt}", err=True)
    if as_json:
        print_json(
            {
                "name": name,
                "path": path,
                "fingerprint": made.fingerprint,
                "quality": quality,
                "warning": doubt,
            }
        )
        return
    print_table(("field", "value"), [(key, str(value)) for key, value in quality.items()], title=f"{name} → {path}")


def _kept(store: Store, made: Artifact) -> str:
    """Save, and tell where. Where the store does not take it the file is left here, or the fit would be lost."""
    from steering.errors import StoreUnwritable

    try:
        store.save(made)
    except StoreUnwritable as error:
        path = made.save(Path())
        error.message += f" The fit is kept in {path}: `setpoint artifacts import {path}` puts it into the store."
        raise
    return store.shown(made.name)


def _settings(given: list[str]) -> dict[str, Any]:
    """`name=value` pairs. A value that is no JSON is a text; a list becomes a tuple. Raises SpecError."""
    from pydantic import ValidationError

    from server.schema.jobs import FitMethod
    from steering import SpecError

    found: dict[str, Any] = {}
    for pair in given:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise SpecError("set", expected="name=value", got=pair)
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        found[name] = value
    try:
        checked = FitMethod.model_validate(found).model_dump(exclude_none=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise SpecError(str(first["loc"][0]), expected=first["msg"], got=found.get(str(first["loc"][0]))) from error
    return {name: tuple(value) if isinstance(value, list) else value for name, value in checked.items()}


def _layers(text: str | None) -> tuple[int, ...] | None:
    """`3-7` or `3,4,5`. Raises SpecError."""
    from steering import SpecError

    if text is None:
        return None
    if span := re.fullmatch(r"(\d{1,4})-(\d{1,4})", text):
        return tuple(range(int(span[1]), int(span[2]) + 1))
    if re.fullmatch(r"\d{1,4}(,\d{1,4})*", text):
        return tuple(int(part) for part in text.split(","))
    raise SpecError("layers", expected="layers such as 3-7 or 3,4,5", got=text)
