"""`setpoint version`."""

from __future__ import annotations

import platform

import typer

from server.cli.common import AsJson, print_json


def version(as_json: AsJson = False) -> None:
    """Print the version."""
    from steering import __version__

    if as_json:
        print_json({"setpoint": __version__, "python": platform.python_version()})
    else:
        typer.echo(f"setpoint {__version__}")
