"""`setpoint generate`: unsteered and steered side by side, then what was measured against what was asked."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli.common import (
    AsJson,
    Device,
    Dtype,
    Model,
    Quantization,
    StoreFolder,
    cleanly,
    print_json,
    print_table,
    quietly,
)

if TYPE_CHECKING:
    from server.schema.openai import GenerateRequest
    from steering import Finished


@cleanly
def generate(
    prompt: Annotated[str, typer.Argument(help="What to say to the model.", show_default=False)],
    target: Annotated[
        list[str] | None,
        typer.Option(
            envvar="SETPOINT_TARGET", help="NAME=λ: a concept and its setpoint. May be repeated.", show_default=False
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            envvar="SETPOINT_METHOD", help="Of the targets: lqr, pid, clamp; add and ablate take λ as strength."
        ),
    ] = "lqr",
    intervention: Annotated[
        list[str] | None,
        typer.Option(
            envvar="SETPOINT_INTERVENTION",
            help='Any intervention as a request has it, \'{"type": "neurons", "plan": …}\'. May be repeated.',
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(envvar="SETPOINT_MAX_TOKENS", help="Longest answer in tokens.")] = 80,
    temperature: Annotated[float, typer.Option(envvar="SETPOINT_TEMPERATURE", help="0 is greedy.")] = 0.7,
    seed: Annotated[int, typer.Option(envvar="SETPOINT_SEED", help="Seed of both answers.")] = 0,
    raw: Annotated[
        bool, typer.Option("--raw", envvar="SETPOINT_RAW", help="Continue the text instead of answering it as a chat.")
    ] = False,
    model: Model = None,
    store: StoreFolder = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantization: Quantization = "none",
    as_json: AsJson = False,
) -> None:
    """Generate unsteered and steered, from the same seed, in one batch."""
    quietly(model)
    body = _body(prompt, _interventions(target or [], method, intervention or []), max_tokens, temperature, seed)
    from server.account import receipt, usage
    from server.host import Host
    from server.settings import ServerSettings
    from server.translate import generate_call

    settings = ServerSettings(
        model=model, store=store, device=device, dtype=dtype, quantization=quantization, max_batch=4
    )
    host = Host.load(settings)
    try:
        if raw or not host.has_chat:
            body = body.model_copy(update={"prompt": prompt, "messages": None})
        call = generate_call(body, host)
        steered, unsteered = host.engine.generate(call.requests)
    finally:
        host.engine.stop()
    for end in (steered, unsteered):
        if end.error is not None:
            raise end.error
    account = receipt([steered], call.programs[:1], None)
    if as_json:
        answers = [
            {"text": end.text, "finish_reason": end.reason, "usage": usage([end], [0])} for end in (steered, unsteered)
        ]
        print_json({"model": host.model_id, **answers[0], "steering": account, "unsteered": answers[1]})
        return
    _show(steered, unsteered, account)


def _interventions(targets: list[str], method: str, given: list[str]) -> list[Any]:
    """Those of the targets, then those that were written out. Raises SpecError."""
    from steering import REGISTRY, SpecError

    if not targets and not given:
        raise SpecError("target", expected="at least one --target NAME=λ, or --intervention JSON")
    if method not in REGISTRY:
        raise SpecError("method", expected=f"one of {', '.join(REGISTRY)}", got=method)
    amount = "strength" if method in ("add", "ablate") else "setpoint"
    found: list[Any] = [{"type": method, "concept": name, amount: value} for name, value in map(_target, targets)]
    for text in given:
        try:
            found.append(json.loads(text))
        except ValueError as error:
            raise SpecError("intervention", expected="a JSON object with `type`", got=text) from error
    return found


def _body(prompt: str, interventions: list[Any], max_tokens: int, temperature: float, seed: int) -> GenerateRequest:
    """The same body that HTTP would bring, checked in the same way. Raises SpecError."""
    from pydantic import ValidationError

    from server.schema.errors import from_validation
    from server.schema.openai import GenerateRequest
    from steering import SpecError

    document: dict[str, Any] = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
        "compare": True,
        "steering": {"interventions": interventions, "default": "replace"},
    }
    try:
        return GenerateRequest.model_validate_json(json.dumps(document), strict=True)
    except ValidationError as error:
        refused = from_validation(error.errors(include_url=False), document)
        path = refused.param or "request"
        raise SpecError(path, expected=refused.message.removeprefix(f"{path}: expected ").rstrip(".")) from error


def _target(text: str) -> tuple[str, float]:
    """`NAME=λ`. Raises SpecError."""
    from steering import SpecError

    name, _, value = text.partition("=")
    try:
        number = float(value)
        if not name or number - number != 0:
            raise ValueError(text)
    except ValueError as error:
        raise SpecError("target", expected="NAME=λ with a finite number λ", got=text) from error
    return name, number


def _show(steered: Finished, unsteered: Finished, account: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    console = Console()
    sides = Table.grid(expand=True, padding=(0, 1))
    for _ in range(2):
        sides.add_column(ratio=1)
    sides.add_row(
        Panel(Text(unsteered.text.strip()), title="unsteered"), Panel(Text(steered.text.strip()), title="steered")
    )
    console.print(sides)
    tracking = account["tracking"]
    rows = []
    for label, one in tracking.items():
        for place, measured in zip(one.get("sites", one["layers"]), one["by_layer"], strict=True):
            rows.append((label, str(place), _number(one["setpoint"]), _number(measured)))
        rows.append((label, "mean", _number(one["setpoint"]), _number(one["mean"])))
    if rows:
        print_table(("steered by", "layer", "setpoint", "measured"), rows)
    effort = account["effort"]
    console.print(
        f"effort: mean {effort['mean']:.3f}, max {effort['max']:.3f} of ‖x‖ per layer and token; "
        f"{account['tokens_steered']} tokens steered, {effort['saturated_tokens']} saturated"
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
