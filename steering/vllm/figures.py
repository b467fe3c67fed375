"""vLLM's own figures, as its stat loggers are told them; so that the server's metrics mean the same on both engines."""

from __future__ import annotations

from typing import Any


class Figures:
    """The last step's state, and sums since the start. Written on the engine's thread, read from any."""

    def __init__(self) -> None:
        self.running = 0
        self.kv_used_ratio = 0.0
        self.preempted = 0
        self.prefix_tokens = 0
        self.cached_tokens = 0

    def attach(self, config: Any, engine_index: int = 0) -> Figures:
        """What vLLM calls to make a stat logger."""
        return self

    def record(self, scheduler_stats: Any, iteration_stats: Any, *rest: Any, **more: Any) -> None:
        """Take the figures of one step."""
        if scheduler_stats is not None:
            self.running = scheduler_stats.num_running_reqs
            self.kv_used_ratio = scheduler_stats.kv_cache_usage
            self.prefix_tokens += scheduler_stats.prefix_cache_stats.queries
            self.cached_tokens += scheduler_stats.prefix_cache_stats.hits
        if iteration_stats is not None:
            self.preempted += iteration_stats.num_preempted_reqs

    def log(self) -> None:
        """Nothing: the server has metrics."""

    def log_engine_initialized(self) -> None:
        """Nothing."""

    def record_sleep_state(self, is_awake: int, level: int) -> None:
        """Nothing: it never sleeps."""
