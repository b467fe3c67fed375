"""`setpoint artifacts list|show|import|export|verify|rm`: the store.

Only GGUF needs a model: the one that its vectors are for.
"""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.common import (
    AsJson,
    Model,
    StoreFolder,
    cleanly,
    print_json,
    print_table,
    quietly,
    short,
    store_folder,
)

if TYPE_CHECKING:
    from steering import Artifact, Store
    from steering.gguf import Target

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


@app.command("import")
@cleanly
def import_(
    file: Annotated[Path, typer.Argument(help="A safetensors file of Setpoint, or a GGUF control vector.")],
    name: Annotated[
        str | None,
        typer.Option(envvar="SETPOINT_NAME", help="Name in the store.", show_default="that of the artifact or file"),
    ] = None,
    model: Model = None,
    store: StoreFolder = None,
    as_json: AsJson = False,
) -> None:
    """Verify a file and put it into the store. A control vector becomes a concept of `--model`."""
    quietly(model)
    from server.host import describe
    from steering import SpecError
    from steering.gguf import imported, is_gguf, read_vectors

    if not file.is_file():
        raise SpecError("file", expected="a file that exists", got=str(file))
    opened = _store(store)
    if is_gguf(file):
        vectors = read_vectors(file)
        own = name or re.sub(r"[^a-z0-9._-]+", "-", file.stem.lower()).strip("._-")
        opened.require_own(own)
        found = imported(vectors, own, _target(model))
        if outside := found.body["provenance"]["imported"]["outside"]:
            typer.echo(
                f"Warning: the vectors of blocks {outside} stand apart from the others: they act only where `layers` "
                "names them.",
                err=True,
            )
    else:
        found = _concept(file)
        found = replace(found, name=name or found.name)
        opened.require_own(found.name)
    opened.save(found)
    if as_json:
        print_json(describe(opened, found.name))
    else:
        typer.echo(f"imported {found.name} ({short(found.fingerprint)})")


@app.command()
@cleanly
def export(
    name: Name,
    kind: Annotated[
        str, typer.Option("--format", envvar="SETPOINT_FORMAT", help="safetensors, or gguf for llama.cpp and repeng.")
    ] = "safetensors",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", envvar="SETPOINT_OUTPUT", help="File.", show_default="NAME.FORMAT")
    ] = None,
    model: Model = None,
    store: StoreFolder = None,
) -> None:
    """Write an artifact to a file. GGUF names the architecture of `--model`, which the concept was fitted on."""
    quietly(model)
    from steering import ArtifactError, SpecError
    from steering.artifact import replacing
    from steering.gguf import exported, hint_of, vectors_of

    if kind not in ("safetensors", "gguf"):
        raise SpecError("format", expected="safetensors or gguf", got=kind)
    opened = _store(store)
    found = opened.load(name)
    if kind == "safetensors":
        content = opened.path(name).read_bytes()
    else:
        vectors_of(found)  # raises before a model is loaded
        hint = hint_of(found)
        if not hint:
            target = _target(model)
            if target.model != found.model:
                raise ArtifactError(
                    f"Artifact {name!r} was fitted on model {found.model[:19]}…, this is {target.model[:19]}…; name "
                    "its own with --model.",
                    param="model",
                )
            hint = target.hints[-1]
        content = exported(found, hint)
    path = output or Path(f"{name}.{kind}")
    with replacing(path) as partial:
        partial.write_bytes(content)
    typer.echo(f"wrote {path} ({len(content)} bytes)")


def _target(model: str | None) -> Target:
    from server.host import load_plant
    from steering.gguf import Target

    return Target.of(load_plant(model, "cpu"))


def _concept(file: Path) -> Artifact:
    """A file of ours. Raises ArtifactCorrupt for one that is damaged or holds no concept."""
    from steering import Artifact, Concept

    found = Artifact.load(file)
    Concept.from_artifact(found)
    return found


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
