"""`setpoint artifacts list|show|verify|rm`: the store, without loading a model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.common import AsJson, StoreFolder, cleanly, print_json, print_table, short, store_folder

if TYPE_CHECKING:
    from steering import Store

app = typer.Typer(help="The store of fitted concepts.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="Name of an artifact.", show_default=False)]


def _store(folder: Path | None) -> Store:
    from steering import Store
    from steering.demo import CONCEPTS

    return Store(store_folder(folder), builtin=CONCEPTS)


@app.command("list")
@cleanly
def list_(store: StoreFolder = None, as_json: AsJson = False) -> None:
    """List every artifact."""
    entries = _store(store).entries()
    if as_json:
        print_json({"object": "list", "data": [asdict(entry) for entry in entries]})
        return
    rows = [
        (e.name, e.kind, short(e.fingerprint), short(e.model), e.created, "built in" if e.builtin else "store")
        for e in entries
    ]
    print_table(("name", "kind", "fingerprint", "model", "created", "from"), rows)


@app.command()
@cleanly
def show(name: Name, store: StoreFolder = None, as_json: AsJson = False) -> None:
    """Show one artifact: its tensors, quality and provenance."""
    from server.host import describe

    found = describe(_store(store), name)
    if as_json:
        print_json(found)
        return
    import json

    rows = [(key, value if isinstance(value, str) else json.dumps(value)) for key, value in found.items()]
    print_table(("field", "value"), rows)


@app.command()
@cleanly
def verify(
    names: Annotated[list[str] | None, typer.Argument(help="Names; every file of the store without them.")] = None,
    store: StoreFolder = None,
    as_json: AsJson = False,
) -> None:
    """Read artifacts whole and check their hashes. Exit code 1 if one is damaged."""
    from steering import SteeringError

    opened = _store(store)
    files = {
        path.stem for folder in (opened.folder, opened.builtin) if folder for path in folder.glob("[!.]*.safetensors")
    }
    results = []
    for name in names or sorted(files):
        try:
            opened.load(name)
            results.append({"name": name, "ok": True, "error": None})
        except SteeringError as error:
            results.append({"name": name, "ok": False, "error": error.message})
    if as_json:
        print_json({"object": "list", "data": results})
    else:
        print_table(("name", "state"), [(str(r["name"]), "whole" if r["ok"] else str(r["error"])) for r in results])
    if not all(r["ok"] for r in results):
        raise typer.Exit(1)


@app.command()
@cleanly
def rm(name: Name, store: StoreFolder = None) -> None:
    """Delete an artifact of the store."""
    _store(store).remove(name)
    typer.echo(f"removed {name}")
