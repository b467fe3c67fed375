"""The command `setpoint`. One file a command; nothing heavy is imported before a command runs."""

from __future__ import annotations

import typer

from server.cli import artifacts
from server.cli.bench import bench
from server.cli.doctor import doctor
from server.cli.evaluate import evaluate
from server.cli.fit import fit
from server.cli.generate import generate
from server.cli.serve import serve
from server.cli.version import version

app = typer.Typer(
    name="setpoint",
    help="Serve a language model and hold chosen concepts at a setpoint while it generates.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (serve, generate, fit, bench, doctor, version):
    app.command()(command)
app.command("eval")(evaluate)
app.add_typer(artifacts.app, name="artifacts")


def main() -> None:
    """Entry point of the console script."""
    app()
