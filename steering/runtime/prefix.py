"""What a request shares of its prompt: blocks named by their tokens and what steers them, and what was measured there.

The keys and values of a token depend on the tokens up to it and on the control that acted on them, on nothing else. So
a block is marked with the program's fingerprint and the channels that act at each of its tokens, or with nothing where
none does; the marks of all blocks before it are in its name. A prompt is shared up to the block before its last token,
whose logits are always computed.

Not shared: prompts whose log-probabilities are asked for, since these need every token's logits; and what a condition
steers, since its measurements belong to a request's account.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from steering.runtime.blocks import chain
from steering.runtime.launches import Reading
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
    salt = request.cache_salt.encode(errors="surrogatepass")
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


def record(
    reading: Reading | None, steerings: Mapping[str, Steering], size: int, segment: Segment, start: int
) -> Record | None:
    """What a step measured in a segment's block that starts at position `start`; None where nothing acted.

    All of it, also what is in the receipt of this request already: whoever takes the block over was told nothing yet.
    """
    name = segment.sequence.request.id
    if reading is None or (steering := steerings.get(name)) is None:
        return None
    active_PR = steering.prompt_IR[start : start + size]
    tokens_K = np.flatnonzero(active_PR.any(axis=1))
    if not len(tokens_K):
        return None
    first = segment.offset + start - segment.start
    at = slice(first, first + size)
    part = Reading(
        reading.routes,
        reading.sites,
        reading.measured_TPR[at].copy(),
        reading.effort_WT[:, at].copy(),
        reading.saturated_T[at].copy(),
        reading.total_T[at].copy(),
        reading.top_T[at].copy(),
    )
    return Record(Steered(name, tokens_K, active_PR[tokens_K]), part)
