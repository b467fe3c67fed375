"""A request while it runs: its random numbers, its text, its measurements; and what each drawn token turns into."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from steering.errors import SteeringError
from steering.runtime.detokenize import Decode, Detokenizer, StopFilter
from steering.runtime.receipt import Receipt, Tally
from steering.runtime.request import Delta, Event, Finished, LayerReading, Reason, Request, TokenLogprob, Usage
from steering.runtime.sampler import Draw, Drawn
from steering.runtime.scheduler import Sequence

Deliver = Callable[[Event], None]
"""Called on the engine's thread with every event of a request; if it raises, that request is aborted."""


@dataclass(slots=True)
class Live:
    """One request's own state. Its place in the batch is its `sequence`."""

    sequence: Sequence
    deliver: Deliver
    draw: Draw
    detokenizer: Detokenizer
    stops: StopFilter
    eos: frozenset[int]
    tally: Tally | None
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    judged: list[TokenLogprob] = field(default_factory=list)
    """Log-probabilities of the prompt's tokens from the second on, as far as it was read."""
    traces: list[tuple[LayerReading, ...]] = field(default_factory=list)
    submitted: float = field(default_factory=time.monotonic)
    admitted: float | None = None

    @classmethod
    def of(cls, sequence: Sequence, deliver: Deliver, decode: Decode, eos: frozenset[int]) -> Live:
        """The state before the first step. `eos` are the ids that end a sequence of this model."""
        request = sequence.request
        eos = frozenset() if request.sampling.ignore_eos else eos
        return cls(
            sequence,
            deliver,
            Draw.of(request.sampling, request.prompt, eos),
            Detokenizer(decode, request.prompt),
            StopFilter(request.sampling.stop),
            eos,
            Tally(request.program) if request.program.terms else None,
        )

    @property
    def request(self) -> Request:
        """What was asked."""
        return self.sequence.request

    def push(self, drawn: Drawn, trace: tuple[LayerReading, ...] | None) -> tuple[Delta, Finished | None]:
        """The events of one drawn token, which the sequence already holds."""
        token, sampling = drawn.token, self.request.sampling
        self.draw.advance(token)
        if drawn.logprob is not None:
            self.logprobs.append(drawn.logprob)
        if trace is not None:
            self.traces.append(trace)

        reason: Reason | None = None
        stop_reason: str | int | None = None
        if token in self.eos or token in sampling.stop_token_ids:
            reason, piece = "stop", self.stops.flush()
            stop_reason = None if token in self.eos else token
        else:
            piece = self.detokenizer.push(token)
            if self.draw.step >= sampling.min_tokens:
                piece, stop_reason = self.stops.push(piece)
            if stop_reason is not None:
                reason = "stop"
            elif self.draw.is_complete:
                reason, piece = "stop", piece + self.stops.flush()
            elif self.draw.step >= sampling.max_tokens:
                reason, piece = "length", piece + self.stops.flush()
        self.text.append(piece)
        judged = self.prompt_logprobs() if self.draw.step == 1 else None
        delta = Delta(self.request.id, token, piece, drawn.logprob, trace, judged)
        return delta, None if reason is None else self.finished(reason, stop_reason=stop_reason)

    def finished(
        self, reason: Reason, *, error: SteeringError | None = None, stop_reason: str | int | None = None
    ) -> Finished:
        """The last event. Text that was held back is not in it unless a delta carried it."""
        generated = tuple(self.sequence.generated)
        return Finished(
            self.request.id,
            reason,
            "".join(self.text),
            generated,
            Usage(self.sequence.n_prompt, len(generated), self.sequence.cached),
            self.receipt(),
            error,
            stop_reason,
            tuple(self.logprobs) if self.request.sampling.logprobs is not None else None,
            tuple(self.traces) if self.request.trace else None,
            prompt_logprobs=self.prompt_logprobs(),
            queued_seconds=None if self.admitted is None else self.admitted - self.submitted,
        )

    def prompt_logprobs(self) -> tuple[TokenLogprob | None, ...] | None:
        """One entry per prompt token, the first None; None if not asked for or not read to the end."""
        if self.request.sampling.prompt_logprobs is None or len(self.judged) < self.sequence.n_prompt - 1:
            return None
        return (None, *self.judged)

    def receipt(self) -> Receipt | None:
        """What was measured so far; None for a request without steering."""
        return None if self.tally is None else self.tally.receipt()
