"""What an answer says about itself: usage, log-probabilities, the trace and the measured receipt."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from server.tokens import TokenTable
from steering import Delta, Finished, Program, TokenLogprob

TokenText = Callable[[int], str]
Json = dict[str, Any]
_LEAST = -9999.0
"""The least log-probability that is told, as in OpenAI's API: JSON has no infinity."""


def usage(ends: Sequence[Finished], prompts: Sequence[int]) -> Json:
    """Tokens in all. A prompt counts once, however many choices continue it: `prompts` indexes one end of each.

    `cached_tokens` are those of the prompts that were not computed for this request but taken from the prefix cache.
    """
    prompt = sum(ends[index].usage.prompt for index in prompts)
    completion = sum(end.usage.completion for end in ends)
    cached = sum(ends[index].usage.cached for index in prompts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


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


def chat_logprobs(logprobs: Sequence[TokenLogprob], table: TokenTable) -> Json:
    """Log-probabilities in the shape of chat completions. `bytes` are the token's own, also of half a character."""

    def entry(token: int, logprob: float) -> Json:
        return {"token": table.text(token), "logprob": max(logprob, _LEAST), "bytes": table.octets(token)}

    content = [
        {**entry(one.token, one.logprob), "top_logprobs": [entry(token, value) for token, value in one.top]}
        for one in logprobs
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(logprobs: Sequence[TokenLogprob], table: TokenTable, offset: int = 0) -> Json:
    """Log-probabilities in the shape of text completions. `offset`: characters of the text before these tokens.

    `top_logprobs` has the chosen token too, so up to one more than was asked for, as OpenAI's API has it. Of a token
    that begins inside of a character `text_offset` is that character's.
    """
    octets = [_octets(one.token, table) for one in logprobs]
    starts = accumulate(map(_characters, octets), initial=offset)
    return {
        "tokens": [table.text(one.token) for one in logprobs],
        "token_logprobs": [max(one.logprob, _LEAST) for one in logprobs],
        "top_logprobs": [_top(one, len(one.top), table.text) for one in logprobs],
        "text_offset": [
            start if not data or _begins(data[0]) else max(start - 1, 0)
            for start, data in zip(starts, octets, strict=False)
        ],
    }


def spelled(logprobs: Sequence[TokenLogprob], table: TokenTable) -> int:
    """How many characters these tokens begin: what they add to the `offset` of those that follow."""
    return sum(_characters(_octets(one.token, table)) for one in logprobs)


def echoed_logprobs(
    prompt: str, tokens: Sequence[int], logprobs: Sequence[TokenLogprob | None], n_top: int, table: TokenTable
) -> Json:
    """Log-probabilities of a prompt's tokens in the shape of text completions; the first token's are null."""
    return {
        "tokens": [table.text(token) for token in tokens],
        "token_logprobs": [None if one is None else max(one.logprob, _LEAST) for one in logprobs],
        "top_logprobs": [None if one is None else _top(one, n_top, table.text) for one in logprobs],
        "text_offset": text_offsets(prompt, [_octets(token, table) for token in tokens]),
    }


def prompt_logprobs(
    logprobs: Sequence[TokenLogprob | None], n_top: int, table: TokenTable
) -> list[dict[str, Json] | None]:
    """Log-probabilities of a prompt's tokens in vLLM's shape: by token id, the prompt's own token first."""

    def entry(token: int, logprob: float, rank: int) -> Json:
        return {"logprob": max(logprob, _LEAST), "rank": rank, "decoded_token": table.text(token)}

    def position(one: TokenLogprob) -> dict[str, Json]:
        likeliest = enumerate(one.top[:n_top], start=1)
        found = {str(token): entry(token, value, rank) for rank, (token, value) in likeliest if token != one.token}
        return {str(one.token): entry(one.token, one.logprob, one.rank)} | found

    return [None if one is None else position(one) for one in logprobs]


def text_offsets(text: str, tokens: Sequence[bytes]) -> list[int]:
    """The character of `text` at which each of its tokens begins; a token may begin inside of a character.

    Tokens that were added before the text (a beginning-of-text token) stand at 0. Where the tokens do not spell the
    text, since its tokenizer forgets spaces, the offsets are those of the joined tokens, at most the text's length.
    """
    data = text.encode()
    before = max(b"".join(tokens).find(data), 0)
    character = list(accumulate(map(_begins, data), initial=-1))[1:]  # of every byte
    starts = list(accumulate(map(len, tokens), initial=-before))[: len(tokens)]
    return [len(text) if start >= len(data) else character[max(start, 0)] for start in starts]


def _octets(token: int, table: TokenTable) -> bytes:
    """A token's bytes, those of its text where its own are not known."""
    return bytes(table.octets(token) or table.text(token).encode())


def _begins(byte: int) -> bool:
    """Whether a byte of UTF-8 is the first of a character."""
    return (byte & 0xC0) != 0x80


def _characters(data: bytes) -> int:
    return sum(map(_begins, data))


def _top(one: TokenLogprob, n_top: int, text: TokenText) -> dict[str, float]:
    """The likeliest tokens and the chosen one, by text; of tokens that read the same, the likelier one's."""
    found: dict[str, float] = {}
    for token, logprob in (*one.top[:n_top], (one.token, one.logprob)):
        found[text(token)] = max(logprob, found.get(text(token), _LEAST))
    return found
