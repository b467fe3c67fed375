"""What a request carries to vLLM's workers: its whole program, in `SamplingParams.extra_args`.

    extra_args["setpoint"] = {protocol, name, program, fingerprint, first, choices}

Programs travel whole, so that a worker needs no store and no names. `first` is all that the engine core has to know:
blocks of the prefix cache before it are like everybody's (`steering.vllm.salt`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from steering.errors import SpecError
from steering.program import Program
from steering.wire import pack, unpack

PROTOCOL = 1
"""Version of what the front, the engine core and the workers say to each other."""
KEY = "setpoint"
"""Where a compiled program stands in `extra_args`."""
ASKED = "steering"
"""Where a client's steering stands in `extra_args` (`vllm_xargs` of a request) before it is compiled."""
MARK = "salted"
"""What the engine core sets in an attachment: the plugin is there, and names the blocks of the prefix cache."""


@dataclass(frozen=True, slots=True)
class Attachment:
    """A program on its way to the workers.

    name: under which its measurements come back, unique among those that run. first: the first position that may be
    steered. choices: how many sequences of vLLM's share it (`n`).
    """

    name: str
    program: Program
    first: int
    choices: int = 1

    def to_args(self) -> dict[str, Any]:
        """As `extra_args[KEY]` has it."""
        return {
            "protocol": PROTOCOL,
            "name": self.name,
            "program": pack(self.program),
            "fingerprint": self.program.fingerprint,
            "first": self.first,
            "choices": self.choices,
        }

    @classmethod
    def of(cls, name: str, program: Program, n_prompt: int, choices: int = 1) -> Attachment:
        """The attachment of a program that acts, for a prompt of so many tokens."""
        return cls(name, program, first_steered(program, n_prompt), choices)

    @classmethod
    def read(cls, args: Mapping[str, Any]) -> Attachment:
        """What `to_args` made and the engine core marked. Raises SpecError for another protocol and where the mark is
        missing, ArtifactCorrupt for a damaged program."""
        protocol = args.get("protocol")
        if protocol != PROTOCOL:
            raise SpecError(
                f"{KEY}.protocol", expected=str(PROTOCOL), got=protocol, advice="use one version of Setpoint throughout"
            )
        if MARK not in args:
            raise SpecError(
                KEY,
                expected="an engine core with Setpoint's plugin in it, which keeps steered blocks of the cache apart",
                advice="install setpoint in its environment, and do not leave it out of VLLM_PLUGINS",
            )
        return cls(str(args["name"]), unpack(args["program"]), int(args["first"]), int(args["choices"]))


def first_steered(program: Program, n_prompt: int) -> int:
    """The first position at which a program may act or ask; `n_prompt` if that is the first decode step."""
    mask_I = np.zeros(n_prompt, dtype=bool)
    for term in program.terms:
        if not term.acts:
            continue
        if term.gate is not None and term.gate.when.on == "prompt":
            mask_I[-1:] = True  # where it is asked
            continue
        for scope in term.scopes or (term.scope,):
            mask_I |= scope.prompt_mask(n_prompt)
    steered = np.flatnonzero(mask_I)
    return int(steered[0]) if len(steered) else n_prompt


def share_name(name: str, request_id: str, choices: int) -> str:
    """Under which name the measurements of one of vLLM's sequences come back: one for each of several choices, by the
    index that vLLM puts before their common id."""
    return name if choices == 1 else choice_name(name, int(request_id.split("_", 1)[0]))


def choice_name(name: str, index: int) -> str:
    """The name of one of several choices."""
    return f"{name}/{index}"
