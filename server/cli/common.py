"""What the commands share: options, output as a table or as JSON, and a clean end on bad input."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer

P = ParamSpec("P")

Model = Annotated[
    str | None,
    typer.Option(envvar="SETPOINT_MODEL", help="Folder or hub id of a model.", show_default="the embedded demo model"),
]
Device = Annotated[
    str, typer.Option(envvar="SETPOINT_DEVICE", help="cpu, cuda, cuda:1, …; auto takes a GPU if there is one.")
]
Dtype = Annotated[str, typer.Option(envvar="SETPOINT_DTYPE", help="auto, float32, bfloat16 or float16.")]
Quantization = Annotated[
    str,
    typer.Option(
        envvar="SETPOINT_QUANTIZATION",
        help="Quantize weights while loading: int8, int8-dynamic, fp8 (torchao), nf4, int8-outliers (bitsandbytes).",
    ),
]
StoreFolder = Annotated[
    str | None,
    typer.Option(
        "--store",
        envvar="SETPOINT_STORE",
        metavar="FOLDER|URL",
        help="Folder of the artifacts, or the URL of a shared one: s3://, gs://, hf://, file://.",
        show_default="user data folder",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", envvar="SETPOINT_JSON", help="Print JSON.")]


def cleanly(command: Callable[P, None]) -> Callable[P, None]:
    """Bad input ends a command with exit code 2 and one sentence on stderr; the loss of a process that shares the model
    with code 1."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        from steering import SteeringError, TeamLost

        try:
            command(*args, **kwargs)
        except SteeringError as error:
            typer.echo(f"setpoint: {error.message}", err=True)
            raise typer.Exit(1 if isinstance(error, TeamLost) else 2) from None

    return wrapped


def quietly(model: str | None = None) -> None:
    """No progress bars of libraries while a model on this disk loads, unless the environment asks for them.

    A download keeps its bars. Has to be called before the libraries are imported.
    """
    if model is None or os.path.isdir(model):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def store_place(given: str | None) -> Path | str:
    """The folder of the artifacts, or its URL."""
    from server.settings import default_store, located

    return located(given) if given else default_store()


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    json.dump(document, sys.stdout, ensure_ascii=False, indent=2, allow_nan=False)
    sys.stdout.write("\n")


@contextmanager
def progress_bar(stage: str) -> Iterator[Callable[[str, float], None]]:
    """A bar on stderr while the work goes on; what it gives takes a stage and the share that is done."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(stage, total=1.0)
        yield lambda now, done: bar.update(task, description=now, completed=done)


WIDE = 250
"""Columns of a table that goes to a file or a pipe."""


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """A table on stdout: as wide as the terminal, or as it needs where nobody looks at it in one."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else WIDE).print(table)


def short(fingerprint: str) -> str:
    """The beginning of a hash, for tables."""
    return fingerprint.removeprefix("sha256:")[:12]
