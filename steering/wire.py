"""A program as bytes, for the processes that share a model: one safetensors buffer, never pickle.

    header    JSON: format, fingerprint, guard, and of each term all that is not a tensor
    tensors   TERM.ROUTE.FIELD of its laws and edits, TERM.gate the probe of its gate

`unpack(pack(p))` steers bit for bit as `p` does: tensors keep their number format, and numbers their every bit. The
reader computes the fingerprint again, so that a program is never run that is not the one that was sent.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from steering.condition import Gate, When
from steering.edit import FORMS, Acting
from steering.errors import ArtifactCorrupt, SteeringError
from steering.law import Law
from steering.program import Guard, Positions, Program, Scope, Term, Window
from steering.types import Route, Site

FORMAT = "setpoint-program/1"


def pack(program: Program) -> bytes:
    """`program` as bytes: about 4·(D + E) of them for each channel of a route in float32."""
    tensors: dict[str, Tensor] = {}
    document = {
        "format": FORMAT,
        "fingerprint": program.fingerprint,
        "guard": asdict(program.guard),
        "terms": [_packed_term(str(i), term, tensors) for i, term in enumerate(program.terms)],
    }
    body = save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})
    header = json.dumps(document).encode()
    return len(header).to_bytes(8, "little") + header + body


def unpack(data: bytes) -> Program:
    """The program that was packed. Raises ArtifactCorrupt where `data` is not one, whole."""
    try:
        length = int.from_bytes(data[:8], "little")
        document = json.loads(data[8 : 8 + length])
        if document["format"] != FORMAT:
            raise ValueError(document["format"])
        tensors = load(data[8 + length :])
        terms = tuple(_unpacked_term(str(i), one, tensors) for i, one in enumerate(document["terms"]))
        program = Program(terms, Guard(**document["guard"]))
        is_sent = program.fingerprint == document["fingerprint"]
    # RuntimeError: JSON that is nested too deep (RecursionError), tensors of shapes that no law has.
    except (SafetensorError, SteeringError, ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:
        raise ArtifactCorrupt("The program that was sent is not whole, or of another version of Setpoint.") from error
    if not is_sent:
        raise ArtifactCorrupt("The program that was sent does not have the fingerprint that it was sent under.")
    return program


def _packed_term(name: str, term: Term, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """All of a term that is not a tensor; its tensors are added to `tensors`."""
    laws = []
    for j, (route, law) in enumerate(term.laws.items()):
        laws.append([_packed_route(route), None if isinstance(law, Law) else list(law.channel)])
        tensors.update({f"{name}.{j}.{key}": value for key, value in _tensors(law).items()})
    gate = None
    if term.gate is not None:
        tensors[f"{name}.gate"] = term.gate.probe
        gate = {n: getattr(term.gate, n) for n in ("low", "high", "origin", "scale")} | {"when": asdict(term.gate.when)}
    return {
        "label": term.label,
        "type": term.type,
        "laws": laws,
        "scope": asdict(term.scope),
        "units": term.units,
        "target": term.target,
        "gauges": [[_packed_route(route), *pair] for route, pair in term.gauges.items()],
        "gate": gate,
        "scopes": [asdict(scope) for scope in term.scopes],
        "is_whole": term.is_whole,
    }


def _unpacked_term(name: str, one: dict[str, Any], tensors: dict[str, Tensor]) -> Term:
    laws: dict[Route, Acting] = {}
    for j, (place, channel) in enumerate(one["laws"]):
        route = _unpacked_route(place)
        parts: dict[str, Any] = {} if channel is None else {"channel": tuple(channel)}
        prefix = f"{name}.{j}."
        parts |= {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        laws[route] = FORMS[route.form](**parts)
    gate = None
    if one["gate"] is not None:
        rest = dict(one["gate"])
        gate = Gate(When(**rest.pop("when")), tensors[f"{name}.gate"], **rest)
    return Term(
        one["label"],
        one["type"],
        laws,
        _unpacked_scope(one["scope"]),
        one["units"],
        one["target"],
        {_unpacked_route(place): (origin, scale) for place, origin, scale in one["gauges"]},
        gate,
        tuple(map(_unpacked_scope, one["scopes"])),
        one["is_whole"],
    )


def _tensors(law: Acting) -> dict[str, Tensor]:
    return {f.name: value for f in fields(law) if isinstance(value := getattr(law, f.name), Tensor)}


def _packed_route(route: Route) -> list[Any]:
    return [*route.read, *route.write, route.form]


def _unpacked_route(place: list[Any]) -> Route:
    read_tap, read_layer, write_tap, write_layer, form = place
    return Route(Site(read_tap, read_layer), Site(write_tap, write_layer), form)


def _unpacked_scope(one: dict[str, Any]) -> Scope:
    prompt, generation = one["prompt"], one["generation"]
    if isinstance(prompt, dict):
        prompt = Positions(tuple(prompt["positions"])) if "positions" in prompt else Window(tuple(prompt["window"]))
    return Scope(prompt, Window(tuple(generation["window"])) if isinstance(generation, dict) else generation)
