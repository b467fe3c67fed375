"""`setpoint artifacts list|show|import|export|verify|rm`: the store.

Only GGUF needs a model: the one that its vectors are for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
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
    store_place,
)

if TYPE_CHECKING:
    from steering import Artifact, Store
    from steering.formats.gguf import Target

app = typer.Typer(help="The store of fitted concepts.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="Name of an artifact.", show_default=False)]


def _store(where: str | None) -> Store:
    from server.host import open_store

    return open_store(store_place(where))


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
    file: Annotated[
        Path,
        typer.Argument(
            help="A safetensors file of Setpoint, a GGUF control vector, a folder of pyreft's or a LoRA of PEFT's, as "
            "safetensors, or the folder of a sparse autoencoder, of SAELens or Gemma Scope."
        ),
    ],
    name: Annotated[
        str | None,
        typer.Option(envvar="SETPOINT_NAME", help="Name in the store.", show_default="that of the artifact or file"),
    ] = None,
    positions: Annotated[
        str,
        typer.Option(
            envvar="SETPOINT_POSITIONS",
            help="Of a pyreft folder: the positions it was trained on, as f7+l7.",
            show_default="not known",
        ),
    ] = "",
    site: Annotated[
        str,
        typer.Option(
            envvar="SETPOINT_SITE",
            help="Of an autoencoder: what it reads, as resid_post.20.",
            show_default="as its folder says",
        ),
    ] = "",
    texts: Annotated[
        Path | None,
        typer.Option(
            envvar="SETPOINT_TEXTS",
            help="Of an autoencoder: texts, one a line or JSONL, on which its largest activations are measured.",
        ),
    ] = None,
    model: Model = None,
    store: StoreFolder = None,
    as_json: AsJson = False,
) -> None:
    """Verify a file and put it into the store. A control vector becomes a concept of `--model`; the folder of a pyreft
    edit, of a LoRA adapter or of a sparse autoencoder becomes a plan of it."""
    quietly(model)
    from server.host import describe
    from steering import SpecError
    from steering.formats.gguf import imported, is_gguf, read_vectors
    from steering.formats.peft import is_adapter
    from steering.formats.sae import is_autoencoder

    if not file.is_file() and not file.is_dir():
        raise SpecError("file", expected="a file or folder that exists", got=str(file))
    opened = _store(store)
    if file.is_dir():
        own = name or _name_of(file.resolve().name)
        opened.require_own(own)
        told = {"positions": positions, "site": site, "texts": texts}
        if is_adapter(file):
            _refuse(told, "a LoRA")
            found = _adapter(file, own, model)
        elif is_autoencoder(file):
            _refuse({"positions": positions}, "an autoencoder")
            found = _autoencoder(file, own, site, texts, model)
        else:
            _refuse({"site": site, "texts": texts}, "a pyreft edit")
            found = _edit(file, own, positions, model)
    elif is_gguf(file):
        vectors = read_vectors(file)
        own = name or _name_of(file.stem)
        opened.require_own(own)
        found = imported(vectors, own, _target(model))
        if outside := found.body["provenance"]["imported"]["outside"]:
            typer.echo(
                f"Warning: the vectors of blocks {outside} stand apart from the others: they act only where `layers` "
                "names them.",
                err=True,
            )
    else:
        found = _ours(file)
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
        str | None,
        typer.Option(
            "--format",
            envvar="SETPOINT_FORMAT",
            help="safetensors, or gguf for llama.cpp and repeng.",
            show_default="that of --output, else safetensors",
        ),
    ] = None,
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
    from steering.formats.gguf import exported, hint_of, vectors_of

    kinds = ("safetensors", "gguf")
    told = output.suffix.removeprefix(".") if output is not None else ""
    kind = kind or (told if told in kinds else "safetensors")
    if kind not in kinds:
        raise SpecError("format", expected="safetensors or gguf", got=kind)
    if told in kinds and told != kind:
        raise SpecError("output", expected=f"a name that does not end in .{told}, for --format {kind}", got=str(output))
    if output is not None and not output.parent.is_dir():
        raise SpecError("output", expected="a folder that exists", got=str(output.parent))
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
    from steering.formats.gguf import Target

    return Target.of(load_plant(model, "cpu"))


def _name_of(text: str) -> str:
    """A name for the store, made of a file's."""
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("._-")


def _refuse(options: Mapping[str, object], what: str) -> None:
    """Raises SpecError for an option that was given though it says nothing of such a folder."""
    from steering import SpecError

    for name, value in options.items():
        if value:
            raise SpecError(name, expected=f"nothing: {what} has no {name}", got=str(value))


def _edit(folder: Path, name: str, positions: str, model: str | None) -> Artifact:
    """The plan of a pyreft folder. Raises SpecError, ArtifactCorrupt."""
    from server.host import load_plant
    from steering.formats.pyreft import import_reft, parse_positions

    parse_positions(positions)  # before a model is loaded
    return import_reft(folder, name, load_plant(model, "cpu"), positions=positions).artifact()


def _adapter(folder: Path, name: str, model: str | None) -> Artifact:
    """The plan of a LoRA's folder. Raises SpecError, ArtifactCorrupt."""
    from server.host import load_plant
    from steering.formats.peft import import_adapter

    return import_adapter(folder, name, load_plant(model, "cpu")).artifact()


def _autoencoder(folder: Path, name: str, site: str, texts: Path | None, model: str | None) -> Artifact:
    """The plan of an autoencoder's folder. Raises SpecError, ArtifactCorrupt."""
    from server.host import load_plant
    from steering import read_examples
    from steering.formats.sae import import_sae, parse_site

    if site:
        parse_site(site)  # before a model is loaded
    rows = None if texts is None else read_examples(texts)
    return import_sae(folder, name, load_plant(model, "cpu"), site=site, texts=rows).artifact()


def _ours(file: Path) -> Artifact:
    """A file of ours. Raises ArtifactCorrupt for one that is damaged or of a kind that there is not."""
    from steering import Artifact
    from steering.store import held_in

    found = Artifact.load(file)
    held_in(found)
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
    results = []
    for name in names or opened.names():
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
    """Delete an artifact of the store, unless a preset or the default uses it."""
    from server.presets import Presets
    from steering import ArtifactError

    opened = _store(store)
    if users := Presets(opened.place).users(name):
        raise ArtifactError(f"Artifact {name!r} is in use by {', '.join(users)}: change or delete that first.")
    opened.remove(name)
    typer.echo(f"removed {name}")
