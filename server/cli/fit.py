"""`setpoint fit`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from server.cli.common import (
    AsJson,
    Device,
    Dtype,
    Model,
    StoreFolder,
    cleanly,
    print_json,
    print_table,
    quietly,
    store_folder,
)

USABLE_AUROC = 0.7
"""Below it a direction hardly tells the classes apart, and the command warns."""


@cleanly
def fit(
    name: Annotated[str, typer.Argument(help="Name of the concept.", show_default=False)],
    positive: Annotated[
        Path, typer.Option(envvar="SETPOINT_POSITIVE", help="Examples: one a line, or JSONL with `text` or `messages`.")
    ],
    negative: Annotated[Path, typer.Option(envvar="SETPOINT_NEGATIVE", help="Examples of the opposite.")],
    model: Model = None,
    store: StoreFolder = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
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
    as_json: AsJson = False,
) -> None:
    """Fit a concept from positive and negative examples and put it into the store."""
    quietly(model)
    from server.host import load_plant, open_store
    from steering import FitSettings, fit_concept, read_examples

    target = open_store(store_folder(store))
    if model is None:
        target.require_own(name)
    settings = FitSettings(
        gains=tuple(gains or ("dense",)),
        q=q,
        r=r,
        q_f=q_f,
        jacobian_prompts=jacobian_prompts,
        positions=positions,
        layers=_layers(layers),
    )
    examples = read_examples(positive), read_examples(negative)
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading the model", total=1.0)
        plant = load_plant(model, device, dtype)
        concept = fit_concept(
            plant, name, *examples, settings, lambda stage, done: bar.update(task, description=stage, completed=done)
        )
    path = target.save(concept.artifact())
    quality = dict(concept.quality)
    if (best := max(quality["auroc"])) < USABLE_AUROC:
        typer.echo(
            f"Warning: no layer tells the classes apart (best AUROC {best:.2f} on {quality['measured_on']} examples): "
            "give more examples, and clearer ones.",
            err=True,
        )
    if as_json:
        print_json({"name": name, "path": str(path), "fingerprint": concept.artifact().fingerprint, "quality": quality})
        return
    print_table(("field", "value"), [(key, str(value)) for key, value in quality.items()], title=f"{name} → {path}")


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
