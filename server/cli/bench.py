"""`setpoint bench`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from server.cli.common import (
    AsJson,
    Device,
    Dtype,
    Model,
    Quantization,
    cleanly,
    print_json,
    print_table,
    progress_bar,
    quietly,
)


@cleanly
def bench(
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantization: Quantization = "none",
    batch: Annotated[int, typer.Option(envvar="SETPOINT_BATCH", help="Requests that run at once.")] = 16,
    programs: Annotated[
        list[int] | None,
        typer.Option(
            envvar="SETPOINT_PROGRAMS", help="Distinct programs of a row. May be repeated.", show_default="1, 16, 64"
        ),
    ] = None,
    interventions: Annotated[
        list[int] | None,
        typer.Option(
            envvar="SETPOINT_INTERVENTIONS",
            help="Interventions of a request. May be repeated.",
            show_default="1, 4, 16",
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(envvar="SETPOINT_MAX_TOKENS", help="Tokens of an answer.")] = 64,
    repeats: Annotated[int, typer.Option(envvar="SETPOINT_REPEATS", help="Pairs of runs of a row.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Measure what steering costs: steered ÷ unsteered throughput over programs and interventions, and a fit's time."""
    quietly(model)
    from server.host import load_plant
    from steering.evaluation.speed import COLUMNS, Load, fit_times, lines, overhead

    load = Load(
        batch=batch,
        programs=tuple(programs or (1, 16, 64)),
        interventions=tuple(interventions or (1, 4, 16)),
        max_tokens=max_tokens,
        repeats=repeats,
    )
    plant = load_plant(model, device, dtype, quantization)
    with progress_bar("bench") as report:
        rows = overhead(plant, load, report)
        times = fit_times(plant, report)
    if as_json:
        print_json({"model": plant.name, "overhead": [asdict(row) for row in rows], "fit": times})
        return
    print_table(COLUMNS, lines(rows), title=f"{plant.name} on {plant.device}")
    print_table(("gains", "seconds"), [(name, f"{seconds:.2f}") for name, seconds in times.items()], title="fit")
