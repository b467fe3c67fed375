"""The interventions, one file each, and how a request's list of them becomes a program."""

from __future__ import annotations

from collections.abc import Sequence

from steering.errors import SteeringError
from steering.methods.ablate import Ablate
from steering.methods.add import Add
from steering.methods.base import conditioned
from steering.methods.clamp import Clamp
from steering.methods.eigenshift import Eigenshift
from steering.methods.lqr import Lqr
from steering.methods.pid import Pid
from steering.methods.reft import Reft
from steering.methods.subspace import Subspace
from steering.program import Guard, Program
from steering.registry import Bench, Intervention

__all__ = ["Ablate", "Add", "Clamp", "Eigenshift", "Lqr", "Pid", "Reft", "Subspace", "compile_program"]


def compile_program(
    interventions: Sequence[Intervention], bench: Bench, guard: Guard | None = None, paths: Sequence[str] | None = None
) -> Program:
    """The superposition of several interventions.

    paths: where each stands in the caller's document, for messages; `interventions[i]` by default. Raises what the
    methods raise, with `param` set to the field's full path.
    """
    terms = []
    for index, intervention in enumerate(interventions):
        path = paths[index] if paths else f"interventions[{index}]"
        try:
            terms.append(intervention.compile(bench))
            path += ".when"
            if intervention.when is not None:
                terms[-1] = conditioned(terms[-1], intervention.when, bench)
        except SteeringError as error:
            raise error.at(path) from error
    return Program(tuple(terms), guard or Guard())
