"""The interventions, one file each, and how a request's list of them becomes a program."""

from __future__ import annotations

from collections.abc import Sequence

from steering.errors import SteeringError
from steering.methods.ablate import Ablate
from steering.methods.act_add import ActAdd
from steering.methods.adapter_mix import AdapterMix
from steering.methods.add import Add
from steering.methods.angular import Angular
from steering.methods.base import conditioned
from steering.methods.channels import Channels
from steering.methods.clamp import Clamp
from steering.methods.eigenshift import Eigenshift
from steering.methods.guards import guarded
from steering.methods.heads import Heads
from steering.methods.interaction import Interaction
from steering.methods.language import Language
from steering.methods.linear_transport import LinearTransport
from steering.methods.lqr import Lqr
from steering.methods.neurons import Neurons
from steering.methods.pid import Pid
from steering.methods.reft import Reft
from steering.methods.sae import Sae
from steering.methods.skip_layers import SkipLayers
from steering.methods.sparsity import Sparsity
from steering.methods.subspace import Subspace
from steering.program import Guard, Program, check_whole
from steering.registry import Bench, Intervention

__all__ = [
    "Ablate",
    "ActAdd",
    "AdapterMix",
    "Add",
    "Angular",
    "Channels",
    "Clamp",
    "Eigenshift",
    "Heads",
    "Interaction",
    "Language",
    "LinearTransport",
    "Lqr",
    "Neurons",
    "Pid",
    "Reft",
    "Sae",
    "SkipLayers",
    "Sparsity",
    "Subspace",
    "compile_program",
]


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
            term = intervention.compile(bench)
            terms.append(guarded(term, bench, spare_massive=intervention.spare_massive))
            path += ".when"
            if intervention.when is not None:
                terms[-1] = conditioned(terms[-1], intervention.when, bench)
        except SteeringError as error:
            raise error.at(path) from error
    check_whole(terms, guard or Guard())
    return Program(tuple(terms), guard or Guard())
