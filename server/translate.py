"""The only translation point: wire types become complete requests, and nothing later can find them invalid.

Runs in a worker thread: tokenising and compiling a program may take milliseconds.
"""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from server.host import Host
from server.schema.errors import ApiError
from server.schema.openai import ChatRequest, CompletionRequest, GenerateRequest, Message, TokenizeRequest, TraceRequest
from server.schema.steering import SteeringSpec
from steering import PlantError, Program, Request, Sampling, SpecError

MAX_CHOICES = 256
"""Most sequences that one HTTP request may ask for."""
DEFAULT_COMPLETION_TOKENS = 16
"""`max_tokens` of a text completion that does not say, as in OpenAI's API."""
_INT64 = 2**63


@dataclass(frozen=True)
class Call:
    """One HTTP request as the engine's requests, and what its answer needs to know."""

    id: str
    model: str
    requests: tuple[Request, ...]
    prompts: tuple[int, ...]
    """Index of the first request of each prompt."""
    steered: bool
    trace: bool
    include_usage: bool
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def programs(self) -> list[Program]:
        """The program of every request."""
        return [request.program for request in self.requests]


def chat_call(body: ChatRequest, host: Host) -> Call:
    """Requests of a chat completion. Raises SteeringError that names the field."""
    tokens = chat_tokens(host, body.messages)
    if body.top_logprobs and not body.logprobs:
        raise SpecError("top_logprobs", expected="logprobs to be true as well", got=body.top_logprobs)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    longer = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    return _call(
        "chatcmpl", body, host, [("messages", tokens)], body.n or 1, None, logprobs, getattr(body, longer), longer
    )


def completion_call(body: CompletionRequest, host: Host) -> Call:
    """Requests of a text completion, prompt by prompt. Raises SteeringError that names the field."""
    given = _each(body.prompt)
    _check_count(len(given) * (body.n or 1), host)
    prompts = [(at, prompt_tokens(host, one, at)) for at, one in given]
    return _call("cmpl", body, host, prompts, body.n or 1, DEFAULT_COMPLETION_TOKENS, body.logprobs, body.max_tokens)


def generate_call(body: GenerateRequest, host: Host) -> Call:
    """The request of a native generation, and its unsteered twin after it where `compare` asks for one.

    The twin has the same seed; where there is none one is drawn for both. Raises SteeringError that names the field.
    """
    tokens = given_tokens(host, body)
    default = DEFAULT_COMPLETION_TOKENS if body.messages is None else None
    where = "prompt" if body.messages is None else "messages"
    if body.seed is None and body.compare:
        body = body.model_copy(update={"seed": secrets.randbelow(_INT64)})
    call = _call("gen", body, host, [(where, tokens)], 1, default, body.logprobs, body.max_tokens)
    if not body.compare:
        return call
    steered = call.requests[0]
    twin = Request(f"{call.id}-unsteered", steered.prompt, steered.sampling)
    return Call(
        call.id, call.model, (steered, twin), call.prompts, call.steered, call.trace, call.include_usage, call.created
    )


def given_tokens(host: Host, body: GenerateRequest | TokenizeRequest | TraceRequest) -> list[int]:
    """The tokens of a body that has either `prompt` or `messages`. Raises SteeringError."""
    if (body.prompt is None) == (body.messages is None):
        raise SpecError("prompt", expected="either prompt or messages", got=None if body.prompt is None else "both")
    if body.messages is not None:
        return chat_tokens(host, body.messages)
    return prompt_tokens(host, body.prompt or "", "prompt")


def chat_tokens(host: Host, messages: Sequence[Message]) -> list[int]:
    """The tokens of a chat and the beginning of the next answer, whoever spoke last. Raises PlantError."""
    return host.plant.encode([message.plain() for message in messages], answer=True)


def prompt_tokens(host: Host, prompt: str | list[int], at: str) -> list[int]:
    """A text's tokens, or checked token ids. Raises PlantError that names `at`."""
    if isinstance(prompt, list):
        return host.check_tokens(prompt, at)
    try:
        return host.plant.encode(prompt)
    except PlantError as error:
        error.param = at
        raise


def check_length(host: Host, tokens: Sequence[int], where: str, wanted: int = 0, wanted_at: str = "max_tokens") -> int:
    """The room that a prompt leaves in the context.

    Raises ApiError 400, with both lengths, where `wanted` tokens do not fit in it; `where` and `wanted_at` are the
    fields of the prompt and of `wanted`.
    """
    length, room = len(tokens), host.context - len(tokens)
    if room >= wanted:
        return room
    if room < min(wanted, 1):
        where_, message = where, f"the prompt has {length} tokens: expected at most {host.context - min(wanted, 1)}"
    else:
        where_ = wanted_at
        message = f"the prompt has {length} tokens and {wanted} are asked for: expected at most {host.context} together"
    raise ApiError(
        400,
        f"{where_}: {message}, since this model's context is {host.context} tokens; shorten it.",
        param=where_,
        code="context_length_exceeded",
    )


def _check_count(choices: int, host: Host) -> None:
    """Raise SpecError for more sequences than one call may have, or than the engine can ever hold."""
    most = min(MAX_CHOICES, host.places)
    if choices > most:
        raise SpecError("n", expected=f"at most {most} choices over all prompts", got=choices)


def _each(prompt: object) -> list[tuple[str, str | list[int]]]:
    """The prompts of a completion, with their paths."""
    if isinstance(prompt, str) or (isinstance(prompt, list) and isinstance(prompt[0], int)):
        return [("prompt", prompt)]
    assert isinstance(prompt, list)
    return [(f"prompt[{index}]", one) for index, one in enumerate(prompt)]


def _call(
    kind: str,
    body: ChatRequest | CompletionRequest | GenerateRequest,
    host: Host,
    prompts: Sequence[tuple[str, list[int]]],
    n: int,
    default: int | None,
    logprobs: int | None,
    limit: int | None,
    limit_at: str = "max_tokens",
) -> Call:
    """`n` requests a prompt; prompts come with their paths. `limit` is what the body says, in its field `limit_at`, of
    the tokens to generate; `default` stands in for it, None for the rest of the context."""
    _check_count(len(prompts) * n, host)
    if body.stream_options is not None and not body.stream:
        raise SpecError("stream_options", expected="stream to be true as well")
    spec, program, targets_at = _program(body, host)
    id_ = f"{kind}-{uuid.uuid4().hex}"
    trace = spec is not None and spec.trace == "tokens"
    requests: list[Request] = []
    for where, tokens in prompts:
        room = check_length(host, tokens, where, limit or 1, limit_at)
        if spec is not None:
            spec.check_scopes(len(tokens), targets_at)
        tokens_out = limit or (room if default is None else min(default, room))
        for choice in range(n):
            sampling = _sampling(body, host, tokens_out, logprobs, choice)
            requests.append(Request(f"{id_}-{len(requests)}", tuple(tokens), sampling, program, trace))
    first = tuple(range(0, len(requests), n))
    usage = bool(body.stream_options and body.stream_options.include_usage)
    return Call(id_, host.model_id, tuple(requests), first, spec is not None, trace, usage)


def _program(
    body: ChatRequest | CompletionRequest | GenerateRequest, host: Host
) -> tuple[SteeringSpec | None, Program, str]:
    """The steering of a body, compiled, and where its targets stand; the short form `targets` of a native generation
    joins it."""
    short = body.targets if isinstance(body, GenerateRequest) else None
    if short is None:
        program = Program() if body.steering is None else body.steering.program(host.shelf)
        return body.steering, program, "steering.targets"
    if body.steering is not None and body.steering.targets:
        raise SpecError("targets", expected="to stand alone, or in steering.targets, not both")
    spec = (body.steering or SteeringSpec()).model_copy(update={"targets": short})
    return spec, spec.program(host.shelf, "targets"), "targets"


def _sampling(
    body: ChatRequest | CompletionRequest | GenerateRequest, host: Host, limit: int, logprobs: int | None, choice: int
) -> Sampling:
    """One choice's sampling. Absent and null fields take OpenAI's defaults. Raises SpecError, PlantError."""
    seed = None if body.seed is None else (body.seed + choice + _INT64) % (2 * _INT64) - _INT64
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    given = {
        name: value
        for name in (
            "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
            "min_tokens", "ignore_eos",
        )
        if (value := getattr(body, name)) is not None
    }  # fmt: skip
    return Sampling(
        max_tokens=limit,
        seed=seed,
        stop=stop,
        stop_token_ids=tuple(host.check_tokens(body.stop_token_ids or [], "stop_token_ids")),
        logit_bias=_logit_bias(body.logit_bias or {}, host),
        logprobs=logprobs,
        **given,
    )


def _logit_bias(biases: dict[str, float], host: Host) -> dict[int, float]:
    """Token ids written as strings, as JSON's keys are."""
    for key in biases:
        if not (key.isascii() and key.isdecimal() and len(key) < 20):
            raise SpecError("logit_bias", expected="token ids as keys", got=key)
    host.check_tokens([int(key) for key in biases], "logit_bias")
    return {int(key): bias for key, bias in biases.items()}
