"""What a request shares of its prompt: blocks named by their tokens and what steers them, and what was measured there.

The keys and values of a token depend on the tokens up to it and on the control that acted on them, on nothing else. So
a block is marked with the program's fingerprint and the channels that act at each of its tokens, or with nothing where
none does; the marks of all blocks before it are in its name. A prompt is shared up to the block before its last token,
whose logits are always computed.

Not shared: prompts whose log-probabilities are asked for, since these need every token's logits; and what a condition
steers, since its measurements belong to a request's account.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from steering.runtime.blocks import chain
from steering.runtime.launches import Reading
from steering.runtime.outcome import Outcome
from steering.runtime.scheduler import Segment, Sequence
from steering.runtime.scope import Steered, Steering


class Record(NamedTuple):
    """What was measured at the steered tokens of one block, as `Tally.add` takes it."""

    steered: Steered
    reading: Reading


def share(sequence: Sequence, steering: Steering | None, size: int) -> None:
    """Name the blocks of a sequence's prompt that may be shared, for each of its rows."""
    request = sequence.request
    n = 0 if request.sampling.prompt_logprobs is not None else (sequence.n_prompt - 1) // size
    marks = [b""] * n if steering is None else _marks(steering, n, size)
    salt = request.cache_salt.encode()
    own = chain(request.prompt, size, marks, salt)
    shadow = chain(request.prompt, size, [b""] * len(own), salt)
    sequence.names = (own, shadow)[: sequence.n_rows]


def _marks(steering: Steering, n: int, size: int) -> list[bytes]:
    """What steers each of the first n blocks; none from the first on that a condition has a say in."""
    marks = []
    program = steering.program
    is_gated = any(term.gate is not None for term in program.terms)
    for i in range(n):
        active_PR = steering.prompt_IR[i * size : (i + 1) * size]
        if not active_PR.any():
            marks.append(b"")
        elif is_gated:
            break
        else:
            marks.append(program.fingerprint.encode() + np.packbits(active_PR).tobytes())
    return marks


def record(outcome: Outcome, size: int, segment: Segment, start: int) -> Record | None:
    """What a step measured in a segment's block that starts at position `start`; None where nothing acted."""
    if outcome.frame is None or outcome.reading is None:
        return None
    name = segment.sequence.request.id
    steered = next((each for each in outcome.frame.steered if each.request_id == name), None)
    if steered is None:
        return None
    first = segment.offset + start - segment.start
    is_own = (steered.tokens_K >= first) & (steered.tokens_K < first + size)
    if not is_own.any():
        return None
    at, reading = slice(first, first + size), outcome.reading
    part = Reading(
        reading.routes,
        reading.sites,
        reading.measured_TPR[at].copy(),
        reading.effort_WT[:, at].copy(),
        reading.saturated_T[at].copy(),
        reading.total_T[at].copy(),
        reading.top_T[at].copy(),
    )
    return Record(Steered(name, steered.tokens_K[is_own] - first, steered.active_KR[is_own]), part)
