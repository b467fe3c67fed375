"""The engine's sizes, and what it tells about itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from steering.errors import SpecError


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Sizes, fixed at start. Raises SpecError that names the field."""

    max_batch: int = 32
    """Sequences that run at once; a request with `max_kl` counts twice."""
    max_len: int | None = None
    """Positions per sequence; None: the model's context, or what fits in half of the free memory."""
    max_step_tokens: int = 512
    """Most tokens of one step; longer prompts are read in chunks."""
    queue_limit: int = 256
    """Requests that may wait beside those that run."""
    program_slots: int = 64
    """Distinct programs resident on the device."""

    def __post_init__(self) -> None:
        for name, least in (("max_batch", 1), ("max_step_tokens", 2), ("queue_limit", 0), ("program_slots", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise SpecError(name, expected=f"an integer >= {least}", got=value)
        if self.max_len is not None and (isinstance(self.max_len, bool) or self.max_len < 1):
            raise SpecError("max_len", expected="an integer >= 1", got=self.max_len)


@dataclass(frozen=True, slots=True)
class Stats:
    """A look at the engine. Counts are since its start; `finished` counts requests by reason."""

    running: int
    waiting: int
    kv_used_ratio: float
    programs_resident: int
    distinct_programs: int
    steps: int
    prompt_tokens: int
    generated_tokens: int
    saturated_tokens: int
    nonfinite: int
    rejected: int
    finished: dict[str, int] = field(default_factory=dict)
