"""The only translation point: wire types become complete requests, and nothing later can find them invalid.

Runs in a worker thread: tokenising and compiling a program may take milliseconds.
"""

from __future__ import annotations

import re
import secrets
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from server.host import Host
from server.schema.capture import CaptureRequest
from server.schema.errors import ApiError
from server.schema.openai import (
    ChatRequest,
    CompletionRequest,
    GenerateRequest,
    Message,
    ResponseFormat,
    TokenizeRequest,
    TraceRequest,
)
from server.schema.steering import Composition, Part, SteeringSpec
from steering import Grammar, PlantError, Program, Request, Sampling, SpecError

MAX_CHOICES = 256
"""Most sequences that one HTTP request may ask for."""
DEFAULT_COMPLETION_TOKENS = 16
"""`max_tokens` of a text completion that does not say, as in OpenAI's API."""
_INT64 = 2**63
_SCHEMA_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


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
    token_ids: bool = False
    """Whether the answer has token ids beside its text."""
    prompt_logprobs: int | None = None
    """As the body asks for them; `Sampling` may hold more, for `echo`."""
    echo: tuple[str, ...] = ()
    """The text of every request's prompt, where it comes before the completion."""
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def programs(self) -> list[Program]:
        """The program of every request."""
        return [request.program for request in self.requests]


class _Prompt(NamedTuple):
    """One prompt: where it stands in the body, its tokens, its text where that is known."""

    at: str
    tokens: list[int]
    text: str | None = None


def chat_call(body: ChatRequest, host: Host) -> Call:
    """Requests of a chat completion. Raises SteeringError that names the field."""
    tokens = chat_tokens(host, body.messages, body)
    if body.top_logprobs and not body.logprobs:
        raise SpecError("top_logprobs", expected="logprobs to be true as well", got=body.top_logprobs)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return _call("chatcmpl", body, host, [_Prompt("messages", tokens)], None, logprobs, body.n or 1)


def completion_call(body: CompletionRequest, host: Host) -> Call:
    """Requests of a text completion, prompt by prompt. Raises SteeringError that names the field."""
    given = _each(body.prompt)
    _check_count(len(given) * (body.n or 1), host)
    prompts = [_Prompt(at, prompt_tokens(host, one, at), _text(host, one) if body.echo else None) for at, one in given]
    return _call("cmpl", body, host, prompts, DEFAULT_COMPLETION_TOKENS, body.logprobs, body.n or 1)


def generate_call(body: GenerateRequest, host: Host) -> Call:
    """The request of a native generation, and its unsteered twin after it where `compare` asks for one.

    The twin has the same seed; where there is none one is drawn for both. Raises SteeringError that names the field.
    """
    tokens = given_tokens(host, body)
    default = DEFAULT_COMPLETION_TOKENS if body.messages is None else None
    where = "prompt" if body.messages is None else "messages"
    if body.seed is None and body.compare:
        body = body.model_copy(update={"seed": secrets.randbelow(_INT64)})
    call = _call("gen", body, host, [_Prompt(where, tokens)], default, body.logprobs)
    if not body.compare:
        return call
    steered = call.requests[0]
    twin = replace(steered, id=f"{call.id}-unsteered", program=Program(), trace=False)
    return replace(call, requests=(steered, twin))


def given_tokens(host: Host, body: GenerateRequest | TokenizeRequest | TraceRequest | CaptureRequest) -> list[int]:
    """The tokens of a body that has either `prompt` or `messages`. Raises SteeringError."""
    if (body.prompt is None) == (body.messages is None):
        raise SpecError("prompt", expected="either prompt or messages", got=None if body.prompt is None else "both")
    turn = body if isinstance(body, GenerateRequest | TokenizeRequest) else None
    if body.messages is not None:
        return chat_tokens(host, body.messages, turn)
    if turn is not None and turn.continue_final_message:
        raise SpecError("continue_final_message", expected="messages, of which the last one is continued, not a prompt")
    return prompt_tokens(host, body.prompt or "", "prompt")


def chat_tokens(
    host: Host, messages: Sequence[Message], turn: ChatRequest | GenerateRequest | TokenizeRequest | None = None
) -> list[int]:
    """The tokens of a chat and the beginning of the next answer, whoever spoke last.

    `turn` may say otherwise: `add_generation_prompt: false` leaves that beginning out, `continue_final_message` leaves
    the last message, the assistant's, open instead. Raises SpecError, PlantError.
    """
    plain = [message.plain() for message in messages]
    if turn is not None and turn.continue_final_message:
        if turn.add_generation_prompt:
            raise SpecError("continue_final_message", expected="add_generation_prompt to be false or absent beside it")
        if plain[-1]["role"] != "assistant":
            raise SpecError(
                "continue_final_message", expected="the last message to be the assistant's", got=plain[-1]["role"]
            )
        return host.plant.encode(plain, open_end=True)
    tokens = host.plant.encode(plain, answer=True)
    if turn is None or turn.add_generation_prompt in (None, True):
        return tokens
    closed = host.plant.tokenizer.apply_chat_template(
        plain, add_generation_prompt=False, tokenize=True, return_dict=False
    )
    return list(closed)


def prompt_tokens(host: Host, prompt: str | list[int], at: str) -> list[int]:
    """A text's tokens, or checked token ids. Raises SpecError that names `at`."""
    if isinstance(prompt, list):
        return host.check_tokens(prompt, at)
    try:
        return host.plant.encode(prompt)
    except PlantError as error:
        raise SpecError(at, expected="a text of at least one token", got=prompt) from error


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
        f"{where_}: {message}, since a request here may have {host.context} tokens; shorten it.",
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


def _text(host: Host, prompt: str | list[int]) -> str:
    """What `echo` gives back of a prompt: a text as it came, token ids with the special ones among them."""
    return prompt if isinstance(prompt, str) else str(host.plant.tokenizer.decode(prompt))


def _call(
    kind: str,
    body: ChatRequest | CompletionRequest | GenerateRequest,
    host: Host,
    prompts: Sequence[_Prompt],
    default: int | None,
    logprobs: int | None,
    n: int = 1,
) -> Call:
    """`n` requests a prompt. `default` is how many tokens to generate where the body does not say, None for the rest of
    the context."""
    _check_count(len(prompts) * n, host)
    if body.stream_options is not None and not body.stream:
        raise SpecError("stream_options", expected="stream to be true as well")
    if body.prompt_logprobs is not None and body.stream:
        raise SpecError("prompt_logprobs", expected="stream to be false", advice="or use echo with logprobs")
    echo = isinstance(body, CompletionRequest) and bool(body.echo)
    limit_at = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    limit: int | None = getattr(body, limit_at)
    if limit == 0 and not echo and body.prompt_logprobs is None:
        alone = "echo or prompt_logprobs" if isinstance(body, CompletionRequest) else "prompt_logprobs"
        raise SpecError(limit_at, expected=f"at least 1, or 0 together with {alone}", got=0)
    steering = _steering(body, host)
    program = Program() if steering is None else steering.program(host.shelf)
    grammar = _grammar(body.response_format, host)
    id_ = f"{kind}-{uuid.uuid4().hex}"
    trace = steering is not None and steering.trace == "tokens"
    asked = [count for count in (logprobs if echo else None, body.prompt_logprobs) if count is not None]
    requests: list[Request] = []
    for where, tokens, _ in prompts:
        room = check_length(host, tokens, where, 1 if limit is None else limit, limit_at)
        tokens_out = limit if limit is not None else room if default is None else min(default, room)
        if steering is not None:
            steering.check_scopes(program, len(tokens), max(tokens_out - 1, 0))
        for choice in range(n):
            told = asked and (choice == 0 or kind != "chatcmpl")  # a chat tells its one prompt once
            sampling = replace(
                _sampling(body, host, tokens_out, logprobs, choice),
                prompt_logprobs=max(asked) if told else None,
                grammar=grammar,
            )
            name, salt = f"{id_}-{len(requests)}", body.cache_salt or ""
            requests.append(Request(name, tuple(tokens), sampling, program, trace, salt))
    return Call(
        id_,
        body.model or host.model_id,
        tuple(requests),
        prompts=tuple(range(0, len(requests), n)),
        steered=steering is not None,
        trace=trace,
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        token_ids=bool(body.return_token_ids),
        prompt_logprobs=body.prompt_logprobs,
        echo=tuple(prompt.text or "" for prompt in prompts for _ in range(n)) if echo else (),
    )


def _grammar(given: ResponseFormat | None, host: Host) -> Grammar | None:
    """What the text must follow; None where it may be anything. Raises SpecError that names the field."""
    if given is None:
        return None
    if given.type != "json_schema":
        if given.json_schema is not None:
            raise SpecError("response_format.json_schema", expected=f"null where type is {given.type!r}")
        return host.grammars.json_object() if given.type == "json_object" else None
    if given.json_schema is None:
        raise SpecError("response_format.json_schema", expected="an object with name and schema")
    if not _SCHEMA_NAME.fullmatch(given.json_schema.name):
        expected = "1 to 64 letters, digits, underscores or hyphens"
        raise SpecError("response_format.json_schema.name", expected=expected, got=given.json_schema.name)
    try:
        return host.grammars.json_schema(given.json_schema.schema_)
    except SpecError as error:
        error.at("response_format.json_schema")
        raise


def _steering(body: ChatRequest | CompletionRequest | GenerateRequest, host: Host) -> Composition | None:
    """What steers a body: the server's default, the preset of its model's name or of its `steering`, and its own
    object, which the short form `targets` of a native generation joins. None where there is nothing of it.

    Raises SteeringError that names the field.
    """
    own, targets_at = body.steering, "steering.targets"
    if isinstance(body, GenerateRequest) and body.targets is not None:
        if own is not None and own.targets:
            raise SpecError("targets", expected="to stand alone, or in steering.targets, not both")
        own, targets_at = (own or SteeringSpec()).model_copy(update={"targets": body.targets}), "targets"
    named, asked = host.preset_of(body.model), own.preset if own else None
    if named is not None and asked not in (None, named):
        raise SpecError("steering.preset", expected=f"null or {named!r}, the preset that model names", got=asked)
    parts = []
    if (name := named if asked is None else asked) is not None:
        parts.append(Part.of_saved(host.presets.asked(name), "steering.preset", f"preset {name!r}"))
    if own is not None:
        parts.append(Part(own, targets_at=targets_at))
    if all(part.spec.default == "compose" for part in parts) and (default := host.presets.default()) is not None:
        parts.insert(0, Part.of_saved(default, "steering.default", "the server's default"))
    return Composition(tuple(parts), own.trace if own else "none") if parts else None


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
