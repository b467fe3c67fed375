"""`setpoint eval`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from server.cli.common import AsJson, StoreFolder, cleanly, print_json, print_table, progress_bar, quietly


@cleanly
def evaluate(
    suite: Annotated[
        Literal["concepts", "methods"],
        typer.Option(
            envvar="SETPOINT_SUITE",
            help="concepts: strengths chosen on one split, reported on another; methods: every method and its control.",
        ),
    ] = "concepts",
    concept: Annotated[
        list[str] | None,
        typer.Option(
            envvar="SETPOINT_CONCEPT",
            help="Concept to measure, for concepts. May be repeated.",
            show_default="positive, polite",
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(envvar="SETPOINT_METHOD", help="Method to measure. May be repeated.", show_default="all"),
    ] = None,
    test_prompts: Annotated[int, typer.Option(envvar="SETPOINT_TEST_PROMPTS", help="Held-out prompts.")] = 64,
    tune_prompts: Annotated[
        int | None,
        typer.Option(
            envvar="SETPOINT_TUNE_PROMPTS", help="Prompts to choose strengths on, for concepts.", show_default="32"
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(envvar="SETPOINT_SEEDS", help="Answers a prompt, for concepts.", show_default="3")
    ] = None,
    max_tokens: Annotated[int, typer.Option(envvar="SETPOINT_MAX_TOKENS", help="Longest answer in tokens.")] = 64,
    out: Annotated[Path, typer.Option(envvar="SETPOINT_OUT", help="Folder for the results.")] = Path("eval"),
    store: StoreFolder = None,
    as_json: AsJson = False,
) -> None:
    """Measure what every method does to the embedded model, at what price."""
    quietly()
    from server.host import Host
    from server.settings import ServerSettings
    from steering import Engine, SpecError, __version__
    from steering.evaluation import (
        COLUMNS,
        HEADER,
        Catalogue,
        Suite,
        rows,
        run_catalogue,
        run_suite,
        table,
        write,
        write_catalogue,
    )

    chosen: dict[str, Any] = {"methods": ("none", *(m for m in method if m != "none"))} if method else {}
    asked: Suite | Catalogue
    header: Sequence[str]
    if suite == "methods":
        for name, value in (("concept", concept), ("tune-prompts", tune_prompts), ("seeds", seeds)):
            if value is not None:
                raise SpecError(name, expected="nothing here: the suite `methods` has its own concepts, and one seed")
        asked = Catalogue(methods=tuple(method or ()), n_prompts=test_prompts, max_tokens=max_tokens)
    else:
        asked = Suite(
            concepts=tuple(concept or ("positive", "polite")),
            tune_prompts=32 if tune_prompts is None else tune_prompts,
            test_prompts=test_prompts,
            seeds=tuple(range(3 if seeds is None else seeds)),
            max_tokens=max_tokens,
            **chosen,
        )
    host = Host.load(ServerSettings(store=store))
    assert isinstance(host.engine, Engine), "the settings' default"
    about = {"version": __version__, "model": host.plant.fingerprint}
    try:
        with progress_bar("eval") as report:
            if isinstance(asked, Catalogue):
                found = run_catalogue(host.plant, host.shelf, host.engine, asked, report)
                paths, header, lines = write_catalogue(out, found, about | asdict(asked)), COLUMNS, table(found)
            else:
                cells = run_suite(host.plant, host.shelf, host.engine, asked, report)
                paths, header, lines = write(out, cells, about), HEADER, rows(cells)
    finally:
        host.engine.stop()
    if as_json:
        print_json({"files": [str(path) for path in paths]})
        return
    print_table(header, lines, title=", ".join(str(path) for path in paths))
