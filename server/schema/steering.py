"""The `steering` object of a request, built from the registry of interventions.

A new method needs no change here: its dataclass is a branch of the union, its fields are the accepted keys, and what
its `__post_init__` refuses is a 400. `targets` come first in the program, then `interventions`, each in its own order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import reduce
from operator import or_
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, create_model

from steering import (
    REGISTRY,
    Bench,
    Guard,
    Intervention,
    Lqr,
    Positions,
    Program,
    Scope,
    SpecError,
    SteeringError,
    Window,
    compile_program,
)

MAX_INTERVENTIONS = 16
"""Most interventions, targets included, of one request."""
_NAME_LIMIT = 64
"""Longest concept name; longer keys are cut where an error repeats them."""


def _target_fields() -> type[BaseModel]:
    """The fields of `lqr` without its name: what a target given as an object may have."""
    hints = get_type_hints(Lqr)
    accepted: dict[str, Any] = {
        f.name: (hints[f.name], ... if f.default is MISSING else f.default)
        for f in fields(Lqr)
        if f.name not in ("type", "concept")
    }
    return create_model("TargetFields", __config__=ConfigDict(extra="forbid"), **accepted)


TargetFields = _target_fields()


def _kind_of_target(value: object) -> str:
    return "fields" if isinstance(value, (dict, TargetFields)) else "number"


Target = Annotated[
    Annotated[float, Tag("number")] | Annotated[TargetFields, Tag("fields")],  # type: ignore[valid-type]
    Discriminator(_kind_of_target),
]
"""A setpoint, or the fields of `lqr`."""

InterventionSpec = Annotated[reduce(or_, REGISTRY.values()), Field(discriminator="type")]  # type: ignore[valid-type]
"""Any registered intervention, chosen by its `type`."""


class SteeringSpec(BaseModel):
    """How one request is steered. Strict: an unknown key, type, name or an impossible value is refused."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    targets: Annotated[dict[str, Target], Field(max_length=MAX_INTERVENTIONS)] = {}
    """Short form: concept name → setpoint of an `lqr` intervention, or that intervention's fields."""
    interventions: Annotated[list[InterventionSpec], Field(max_length=MAX_INTERVENTIONS)] = []  # type: ignore[valid-type]
    """Interventions in full. They superpose."""
    preset: str | None = None
    """A saved steering object; this server has none."""
    default: Literal["compose", "replace"] = "compose"
    """Whether the server's default steering comes before this one."""
    guard: Guard | None = None
    """Bounds on the whole request."""
    trace: Literal["none", "tokens"] = "none"
    """`tokens` reports projection, setpoint and effort for every generated token and layer."""

    def program(self, bench: Bench, targets_at: str = "steering.targets") -> Program:
        """The compiled program. `targets_at` is where the caller wrote the targets, for messages.

        Raises SteeringError with `param` set to the field's path.
        """
        if self.preset is not None:
            raise SpecError(
                "steering.preset",
                expected="null, since this server has no presets",
                got=self.preset,
                advice="leave it out",
            )
        try:
            return self._compiled(bench, targets_at)
        except SteeringError as error:
            error.param = self._short(error.param, targets_at)
            raise

    def check_scopes(self, length: int, targets_at: str = "steering.targets") -> None:
        """Refuse what selects nothing in a prompt of `length` tokens: it would be served unsteered without a word.

        `none` for both prompt and generation stays legal, and so do positions of which one is inside.
        Raises SpecError.
        """
        given = [
            (f"{targets_at}.{name[:_NAME_LIMIT]}", getattr(one, "apply", None)) for name, one in self.targets.items()
        ]
        given += [
            (f"steering.interventions[{index}]", getattr(one, "apply", None))
            for index, one in enumerate(self.interventions)
        ]
        for path, scope in given:
            if isinstance(scope, Scope) and _selects_nothing(scope, length):
                raise SpecError(
                    f"{path}.apply", expected=f"a token to act on, but none of the prompt's {length} tokens is chosen"
                )

    def _compiled(self, bench: Bench, targets_at: str) -> Program:
        found: list[Intervention] = []
        paths: list[str] = []
        for name, target in self.targets.items():
            paths.append(f"{targets_at}.{name[:_NAME_LIMIT]}")
            found.append(_target(name, target, paths[-1]))
        for index, intervention in enumerate(self.interventions):
            paths.append(f"steering.interventions[{index}]")
            found.append(intervention)
        if len(found) > MAX_INTERVENTIONS:
            raise SpecError(
                "steering", expected=f"at most {MAX_INTERVENTIONS} targets and interventions", got=len(found)
            )
        return compile_program(found, bench, self.guard, paths)

    def _short(self, param: str | None, targets_at: str) -> str | None:
        """A target's name is its key, and a target that is a number is its own setpoint: the path ends at the key."""
        if param and param.endswith(".name"):  # what an unusable artifact says of itself; here it is a concept
            param = f"{param.removesuffix('.name')}.concept"
        for name, target in self.targets.items():
            path = f"{targets_at}.{name[:_NAME_LIMIT]}"
            if param == f"{path}.concept" or (param == f"{path}.setpoint" and not isinstance(target, BaseModel)):
                return path
        return param


def _selects_nothing(scope: Scope, length: int) -> bool:
    if (scope.prompt, scope.generation) == ("none", "none") or scope.prompt_mask(length).any():
        return False
    if isinstance(scope.prompt, Positions):
        return True
    steps = scope.generation
    return steps == "none" or (isinstance(steps, Window) and steps.window[0] == steps.window[1])


def _target(name: str, target: object, path: str) -> Intervention:
    given: Mapping[str, Any]
    if isinstance(target, BaseModel):
        given = {key: getattr(target, key) for key in target.model_fields_set}
    else:
        given = {"setpoint": target}
    try:
        return Lqr(concept=name, **given)
    except SpecError as error:
        raise error.at(path) from error


def known_keys(path: str, parent: object) -> list[str]:
    """The keys that the object at `path` of a request may have; empty where that is not known. For messages."""
    if path in ("steering", ""):
        return list(SteeringSpec.model_fields) if path else []
    last = path.rsplit(".", 1)[-1]
    if last == "guard":
        return [f.name for f in fields(Guard)]
    if last == "apply":
        return ["prompt", "generation"]
    if ".targets." in path or path.startswith("targets."):
        return list(TargetFields.model_fields)
    if last.startswith("interventions[") and isinstance(parent, dict):
        method = REGISTRY.get(str(parent.get("type")))
        return [f.name for f in fields(method)] if method else []
    return []
