"""What an answer says about itself: usage, log-probabilities, the trace and the measured receipt."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from server.tokens import TokenTable
from steering import Delta, Finished, Program

TokenText = Callable[[int], str]
Json = dict[str, Any]


def usage(ends: Sequence[Finished], prompts: Sequence[int]) -> Json:
    """Tokens in all. A prompt counts once, however many choices continue it: `prompts` indexes one end of each."""
    prompt = sum(ends[index].usage.prompt for index in prompts)
    completion = sum(end.usage.completion for end in ends)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def receipt(ends: Sequence[Finished], programs: Sequence[Program], trace: TokenText | None) -> Json:
    """The `steering` object of a response.

    It is the receipt of choice 0. Several choices each have their own, listed under `choices` with their index.
    `trace`, where given, adds the readings of every token.
    """
    own = [_receipt(end, program, trace) for end, program in zip(ends, programs, strict=True)]
    if len(own) == 1:
        return own[0]
    return {**own[0], "choices": [{"index": index, **one} for index, one in enumerate(own)]}


def _receipt(end: Finished, program: Program, trace: TokenText | None) -> Json:
    if end.receipt is not None:
        body: Json = dict(end.receipt.to_json())
    else:  # a `steering` object without interventions: nothing acted, nothing was measured
        effort = {"mean": 0.0, "max": 0.0, "saturated_tokens": 0, "sum_mean": 0.0, "sum_max": 0.0}
        body = {"fingerprint": program.fingerprint, "tokens_steered": 0, "tracking": {}, "effort": effort}
    if trace is not None:
        readings = end.trace or ((),) * len(end.tokens)
        body["trace"] = [_reading(token, read, trace) for token, read in zip(end.tokens, readings, strict=False)]
    return body


def traced(deltas: Sequence[Delta], text: TokenText) -> Json:
    """The `steering` object of a chunk: the readings of the tokens it brings."""
    return {"trace": [_reading(delta.token, delta.trace or (), text) for delta in deltas]}


def _reading(token: int, readings: Sequence[Any], text: TokenText) -> Json:
    return {
        "id": token,
        "token": text(token),
        "readings": [
            {
                "label": one.label,
                "layer": one.layer,
                "projection": _finite(one.projection),
                "setpoint": _finite(one.setpoint),
                "effort": _finite(one.effort),
            }
            for one in readings
        ],
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def chat_logprobs(logprobs: Sequence[Any], table: TokenTable) -> Json:
    """Log-probabilities in the shape of chat completions. `bytes` are the token's own, also of half a character."""

    def entry(token: int, logprob: float) -> Json:
        return {"token": table.text(token), "logprob": logprob, "bytes": table.octets(token)}

    content = [
        {**entry(one.token, one.logprob), "top_logprobs": [entry(token, value) for token, value in one.top]}
        for one in logprobs
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(logprobs: Sequence[Any], text: TokenText, offset: int = 0) -> Json:
    """Log-probabilities in the shape of text completions. `offset`: characters of the text before these tokens."""
    tokens = [text(one.token) for one in logprobs]
    return {
        "tokens": tokens,
        "token_logprobs": [one.logprob for one in logprobs],
        "top_logprobs": [{text(token): value for token, value in one.top} for one in logprobs],
        "text_offset": list(accumulate(map(len, tokens), initial=offset))[: len(tokens)],
    }
