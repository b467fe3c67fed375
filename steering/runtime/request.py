"""What goes into the engine and what comes out: plain frozen data.

A `Request` is complete when it is made: text is tokenised, steering is compiled, sampling is checked. Nothing later can
find it invalid, except that it may be too long for the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from steering.errors import SpecError, SteeringError
from steering.program import Program

if TYPE_CHECKING:
    from steering.runtime.grammar import Grammar
    from steering.runtime.receipt import Receipt

MAX_STOPS = 4
"""Most stop strings, as OpenAI's API allows."""
MAX_LOGPROBS = 20
"""Most alternatives reported for a token."""

Reason = Literal["stop", "length", "abort", "error"]
"""Why a request ended."""


def _check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    """Raise SpecError unless `value` is an integer (a bool is not) in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise SpecError(name, expected=f"an integer >= {low}" + ("" if high is None else f" and <= {high}"), got=value)


def _check_real(name: str, value: object, low: float, high: float) -> None:
    """Raise SpecError unless `value` is a finite number in [low, high]."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not (math.isfinite(value) and low <= value <= high)
    ):
        bounds = f">= {low:g}" if math.isinf(high) else f"from {low:g} to {high:g}"
        raise SpecError(name, expected=f"a number {bounds}", got=value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn; fields as in OpenAI's API and vLLM's additions to it.

    max_tokens 0 reads the prompt and draws nothing. temperature 0 is greedy. top_k 0 and top_p 1 keep the whole
    vocabulary. seed None draws one. logprobs None reports none, n reports the chosen token's and the n likeliest;
    prompt_logprobs does so for the prompt's tokens. grammar: what the completion's text must be. Raises SpecError that
    names the field.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        _check_int("max_tokens", self.max_tokens, 0)
        _check_real("temperature", self.temperature, 0, 2)
        _check_real("top_p", self.top_p, 0, 1)
        if self.top_p == 0:
            raise SpecError(
                "top_p", expected="a number in (0, 1]", got=self.top_p, advice="use temperature 0 to be greedy"
            )
        _check_int("top_k", self.top_k, -1)
        _check_real("min_p", self.min_p, 0, 1)
        if self.seed is not None:
            _check_int("seed", self.seed, -(2**63), 2**63 - 1)
        if len(self.stop) > MAX_STOPS or not all(isinstance(s, str) and s for s in self.stop):
            raise SpecError("stop", expected=f"at most {MAX_STOPS} strings that are not empty", got=list(self.stop))
        for token in self.stop_token_ids:
            _check_int("stop_token_ids", token, 0)
        _check_real("presence_penalty", self.presence_penalty, -2, 2)
        _check_real("frequency_penalty", self.frequency_penalty, -2, 2)
        _check_real("repetition_penalty", self.repetition_penalty, 0.01, 100)
        for token, bias in self.logit_bias.items():
            _check_int("logit_bias", token, 0)
            _check_real("logit_bias", bias, -100, 100)
        _check_int("min_tokens", self.min_tokens, 0)
        if self.min_tokens > self.max_tokens:
            raise SpecError("min_tokens", expected=f"at most max_tokens = {self.max_tokens}", got=self.min_tokens)
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            _check_int("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        if self.grammar is not None and self.ignore_eos:
            raise SpecError("ignore_eos", expected="false where a grammar says where the text ends", got=True)

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken: below 1e-5 a temperature would only overflow."""
        return self.temperature < 1e-5


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to generate. `trace` asks for the readings of every generated token.

    cache_salt: prompts are shared only among requests of one salt, so that none can find out what others asked.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    program: Program = field(default_factory=Program)
    trace: bool = False
    cache_salt: str = ""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise SpecError("prompt", expected="at least one token", got=0)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of a token in the model's (steered) distribution before temperature and penalties.

    `top` holds the likeliest tokens in order, as many as were asked for. `rank` is 1 + the number of likelier tokens.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int = 0


@dataclass(frozen=True, slots=True)
class LayerReading:
    """What one layer measured at one token, in the caller's units, and the effort ‖u‖/‖x‖ spent in that layer."""

    label: str
    layer: int
    projection: float
    setpoint: float | None
    effort: float


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of the prompt and of the completion; a final end-of-sequence token counts.

    cached: how many of the prompt were taken from the prefix cache.
    """

    prompt: int
    completion: int
    cached: int = 0


@dataclass(frozen=True, slots=True)
class Delta:
    """One generated token. `text` is what may leave now: possibly empty, while a character or a stop string is open.

    The first one carries `prompt_logprobs`, as `Finished` does.
    """

    request_id: str
    token: int
    text: str
    logprob: TokenLogprob | None = None
    trace: tuple[LayerReading, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a request. `text` is the joined text of its deltas.

    `stop_reason` is the stop string or stop token id that ended it, None for the model's own end of sequence and for
    the end of a grammar. `prompt_logprobs` has one entry per prompt token, the first None as nothing precedes it; None
    if it was not asked for or the prompt was not read to its end. `queued_seconds` is how long it waited to be admitted
    to its first step, None if it never was.
    """

    request_id: str
    reason: Reason
    text: str
    tokens: tuple[int, ...]
    usage: Usage
    receipt: Receipt | None = None
    error: SteeringError | None = None
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    trace: tuple[tuple[LayerReading, ...], ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    queued_seconds: float | None = None


Event = Delta | Finished
"""What a request delivers: deltas, then one `Finished`."""
