"""How long a step of the engine takes, as a law of what is in it, and what a replica can do by that law.

    t = fixed + per_sequence · n + per_position · Σ context + per_prompt_token · p

n requests decode one token each, Σ context are the positions that they attend to, p tokens of prompts are read. With n
places always taken, answers of a tokens and prompts of p, each request lives through a steps, and n prompts are read
meanwhile, its own among them, so

    life = a · (fixed + n · per_sequence + n · context · per_position) + n · p · per_prompt_token
    requests a second = n / life                                               context = p + a / 2 on average

The numbers come from a fit to measured latencies (`benchmarks.capacity.validate`) or, for a machine that is not here,
from its data sheet (`roofline`): those are assumptions and are called so wherever they appear.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.capacity.assumptions import Accelerator, Model, Workload


@dataclass(frozen=True)
class Steps:
    """The law of a step, in seconds."""

    fixed: float
    per_sequence: float
    per_position: float
    per_prompt_token: float

    def seconds(self, decoding: int, context: int, prompt_tokens: int) -> float:
        """A step's time."""
        return (
            self.fixed
            + self.per_sequence * decoding
            + self.per_position * context
            + self.per_prompt_token * prompt_tokens
        )

    def token_seconds(self, places: int, work: Workload) -> float:
        """Time between two tokens of a request while `places` decode, without what prompts take."""
        return self.seconds(places, round(places * work.context), 0)

    def life(self, places: int, work: Workload) -> float:
        """Seconds from admission to the last token while `places` requests run."""
        prompts = self.per_prompt_token * places * work.prompt_read
        return work.answer * self.token_seconds(places, work) + prompts

    def throughput(self, places: int, work: Workload) -> float:
        """Requests a second with all places taken."""
        return places / self.life(places, work)


def roofline(machine: Accelerator, model: Model) -> Steps:
    """The law by a data sheet: weights and keys are read once a step, prompts run at a share of the peak."""
    bandwidth = machine.bandwidth * machine.bandwidth_share
    return Steps(
        fixed=model.weight_bytes / bandwidth + machine.step_overhead,
        per_sequence=machine.sequence_overhead,
        per_position=model.position_bytes / bandwidth,
        per_prompt_token=2 * model.parameters / (machine.flops * machine.flops_share),
    )


def places_that_fit(machine: Accelerator, model: Model, work: Workload) -> int:
    """Requests whose keys and values fit beside the weights and the resident programs, at full length."""
    free = machine.memory * machine.memory_share - model.weight_bytes - model.program_slots * model.program_bytes
    return int(free // ((work.prompt + work.answer) * model.position_bytes))
