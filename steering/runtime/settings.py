"""The engine's sizes, and what it tells about itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from steering.errors import SpecError


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Sizes, fixed at start. Raises SpecError that names the field."""

    max_batch: int = 32
    """Sequences that run at once; a request with `max_kl` counts twice."""
    max_model_len: int | None = None
    """Positions per sequence; None: the model's context, as far as the pool has room for it."""
    kv_tokens: int | None = None
    """Positions of the pool of keys and values, for running sequences and remembered prefixes. None: max_batch
    sequences of full length, as far as half of the free memory allows. With less, requests may be interrupted and read
    again."""
    prefix_cache: bool = True
    """Whether a prompt's blocks are remembered and shared."""
    max_step_tokens: int = 512
    """Most tokens of one step; longer prompts are read in chunks, of a block at least however many requests decode."""
    queue_limit: int = 256
    """Requests that may wait beside those that run."""
    program_slots: int = 256
    """Most distinct programs resident on the device. Memory is taken as they come."""
    graphs: bool | None = None
    """Whether decode steps are recorded and replayed as graphs; None: on a GPU. On a CPU this is for tests."""
    pipeline: bool | None = None
    """Whether a decode step is launched before the tokens of the one before it are known; None: on a GPU, whose work
    goes on meanwhile. On a CPU it would only delay tokens."""
    compile: bool = False
    """Whether torch compiles the feed-forward modules where no program looks inside. Rounding differs in the last bits
    from that of a module that is not compiled; on a CPU it pays for large models only."""

    def __post_init__(self) -> None:
        for name, least in (("max_batch", 1), ("max_step_tokens", 2), ("queue_limit", 0), ("program_slots", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise SpecError(name, expected=f"an integer >= {least}", got=value)
        for name in ("graphs", "pipeline"):
            if not isinstance(value := getattr(self, name), bool | None):
                raise SpecError(name, expected="true, false or null", got=value)
        if not isinstance(self.compile, bool):
            raise SpecError("compile", expected="true or false", got=self.compile)
        for name in ("max_model_len", "kv_tokens"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise SpecError(name, expected="an integer >= 1", got=value)


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
    preempted: int
    prefix_tokens: int
    """Tokens of prompts that could have been shared; `cached_tokens` of them were."""
    cached_tokens: int
    finished: dict[str, int] = field(default_factory=dict)
