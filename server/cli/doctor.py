"""`setpoint doctor`."""

from __future__ import annotations

from dataclasses import asdict

import typer

from server.cli.common import AsJson, StoreFolder, cleanly, print_json, print_table, store_place


@cleanly
def doctor(store: StoreFolder = None, as_json: AsJson = False) -> None:
    """Say what this machine can run, and how to fix what it cannot. Exit code 1 if something needed fails."""
    from steering import diagnose

    checks = diagnose(store_place(store))
    if as_json:
        print_json({"object": "list", "data": [asdict(check) for check in checks]})
    else:
        rows = [(check.name, check.state, check.found + (f"\n→ {check.fix}" if check.fix else "")) for check in checks]
        print_table(("check", "state", "found"), rows)
    if any(check.state == "failed" for check in checks):
        raise typer.Exit(1)
