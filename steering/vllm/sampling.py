"""How tokens are drawn and reported, in vLLM's words.

What ends a completion is decided by us (`steering.runtime.live`), so vLLM is told the end tokens as stop tokens, and no
stop strings. It draws by its own generator: a seed repeats itself there, but does not give the native engine's tokens.
Temperatures between 0 and 0.01 are raised to 0.01 by vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from steering.errors import SpecError
from steering.runtime.grammar import Grammar
from steering.runtime.request import Request, TokenLogprob


def parameters(request: Request, eos: frozenset[int], extra: Mapping[str, Any] | None = None) -> Any:
    """vLLM's `SamplingParams` of a request. `eos` are the model's end tokens; `extra` travels to the workers.

    vLLM always draws: where `max_tokens` is 0 one token is asked for, which its receiver drops.
    """
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    s = request.sampling
    ends = set(s.stop_token_ids) | (frozenset() if s.ignore_eos else eos)
    return SamplingParams(
        max_tokens=max(s.max_tokens, 1),
        # vLLM would keep the tokenizer's end token out as well, which ends nothing here.
        min_tokens=s.min_tokens if ends else 0,
        temperature=0.0 if s.is_greedy else s.temperature,
        top_p=s.top_p,
        top_k=s.top_k,
        min_p=s.min_p,
        seed=None if s.seed is None else s.seed % 2**63,  # -1 would stand for none
        stop_token_ids=sorted(ends),
        ignore_eos=True,
        presence_penalty=s.presence_penalty,
        frequency_penalty=s.frequency_penalty,
        repetition_penalty=s.repetition_penalty,
        logit_bias=dict(s.logit_bias) or None,
        logprobs=s.logprobs,
        prompt_logprobs=s.prompt_logprobs,
        structured_outputs=None if s.grammar is None else _structure(s.grammar),
        extra_args=None if extra is None else dict(extra),
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def _structure(grammar: Grammar) -> Any:
    """A grammar for vLLM's llguidance backend: the schema with the options that it was compiled with."""
    from vllm.sampling_params import StructuredOutputsParams

    try:
        (only,) = json.loads(grammar.source)["grammars"]
        schema = only["json_schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise SpecError("response_format", expected="a JSON Schema, on the vLLM engine") from error
    return StructuredOutputsParams(json=json.dumps(schema))


def reported(token: int, found: Mapping[int, Any], n_top: int) -> TokenLogprob:
    """What vLLM tells of one position: of the token and, by rank, of the `n_top` likeliest."""
    own = found[token]
    likeliest = sorted((each.rank, other, each.logprob) for other, each in found.items() if each.rank <= n_top)
    return TokenLogprob(token, own.logprob, tuple((other, logprob) for _, other, logprob in likeliest), own.rank)
