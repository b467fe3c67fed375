"""`setpoint eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from server.cli.common import AsJson, StoreFolder, cleanly, print_json, print_table, quietly


@cleanly
def evaluate(
    concept: Annotated[
        list[str] | None,
        typer.Option(
            envvar="SETPOINT_CONCEPT", help="Concept to measure. May be repeated.", show_default="positive, polite"
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(envvar="SETPOINT_METHOD", help="Method to measure. May be repeated.", show_default="all"),
    ] = None,
    test_prompts: Annotated[int, typer.Option(envvar="SETPOINT_TEST_PROMPTS", help="Held-out prompts.")] = 64,
    tune_prompts: Annotated[
        int, typer.Option(envvar="SETPOINT_TUNE_PROMPTS", help="Prompts to choose strengths on.")
    ] = 32,
    seeds: Annotated[int, typer.Option(envvar="SETPOINT_SEEDS", help="Answers a prompt.")] = 3,
    max_tokens: Annotated[int, typer.Option(envvar="SETPOINT_MAX_TOKENS", help="Longest answer in tokens.")] = 64,
    out: Annotated[Path, typer.Option(envvar="SETPOINT_OUT", help="Folder for the results.")] = Path("eval"),
    store: StoreFolder = None,
    as_json: AsJson = False,
) -> None:
    """Measure effect, perplexity, effort and tracking of every method on the embedded model."""
    quietly()
    from rich.console import Console
    from rich.progress import Progress

    from server.host import Host
    from server.settings import ServerSettings
    from steering import __version__
    from steering.evaluation import HEADER, Suite, rows, run_suite, write

    chosen: dict[str, Any] = {"methods": ("none", *(m for m in method if m != "none"))} if method else {}
    suite = Suite(
        concepts=tuple(concept or ("positive", "polite")),
        tune_prompts=tune_prompts,
        test_prompts=test_prompts,
        seeds=tuple(range(seeds)),
        max_tokens=max_tokens,
        **chosen,
    )
    host = Host.load(ServerSettings(store=store))
    try:
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("eval", total=1.0)
            cells = run_suite(
                host.plant,
                host.shelf,
                host.engine,
                suite,
                lambda stage, done: bar.update(task, description=stage, completed=done),
            )
    finally:
        host.engine.stop()
    paths = write(out, cells, {"version": __version__, "model": host.plant.fingerprint})
    if as_json:
        print_json({"files": [str(path) for path in paths]})
        return
    print_table(HEADER, rows(cells), title=", ".join(str(path) for path in paths))
