"""The `steering` object of a request, built from the registry of interventions.

A new method needs no change here: its dataclass is a branch of the union, its fields are the accepted keys, and what
its `__post_init__` refuses is a 400. `targets` come first in the program, then `interventions`, each in its own order.

What steers a request may stand in three places, which superpose: the server's default, a preset, the request's own
object. A `Composition` compiles them together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
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
    Term,
    Window,
    check_whole,
    compile_program,
)

MAX_INTERVENTIONS = 16
"""Most interventions, targets included, of one request."""
MAX_CHANNELS = 256
"""Most channels of one request's program: the knobs of every step are as wide as those of the widest program."""
_NAME_LIMIT = 64
"""Longest concept name; longer keys are cut where an error repeats them."""


def _target_fields() -> type[BaseModel]:
    """The fields of `lqr` but the concept's name: what a target given as an object may have."""
    hints = get_type_hints(Lqr)
    accepted: dict[str, Any] = {
        f.name: (hints[f.name], ... if f.default is MISSING else f.default) for f in fields(Lqr) if f.name != "concept"
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
    """Name of a saved steering object, which comes before this one."""
    default: Literal["compose", "replace"] = "compose"
    """Whether the server's default steering comes before this one."""
    guard: Guard | None = None
    """Bounds on the whole request."""
    trace: Literal["none", "tokens"] = "none"
    """`tokens` reports projection, setpoint and effort for every generated token and layer."""

    def concepts(self) -> set[str]:
        """The names of the artifacts that this object mentions."""
        named = set(self.targets)
        for one in (*self.interventions, *self.targets.values()):
            for field in ("concept", "plan"):
                if isinstance(name := getattr(one, field, None), str):
                    named.add(name)
            if (when := getattr(one, "when", None)) is not None:
                named.add(when.concept)
        return named

    def check_saveable(self) -> None:
        """Raises SpecError for what only a request can say: a saved object names no other one and asks for no trace."""
        if self.preset is not None:
            raise SpecError("preset", expected="null, since a saved object may not name another one", got=self.preset)
        if self.trace != "none":
            raise SpecError("trace", expected="none, since each request asks for its own trace", got=self.trace)


@dataclass(frozen=True)
class Part:
    """One steering object of a composition, and where its fields stand, for messages.

    `base` is the path of the object, `targets_at` that of its targets. `saved` says what an error inside a saved object
    is told of: the field that brought it in and its name, as ("steering.preset", "preset 'polite'").
    """

    spec: SteeringSpec
    base: str = "steering"
    targets_at: str = "steering.targets"
    saved: tuple[str, str] | None = None

    @classmethod
    def of_saved(cls, spec: SteeringSpec, field: str = "", name: str = "") -> Part:
        """A saved object, of which paths begin at its own root."""
        return cls(spec, "", "targets", (field, name) if field else None)

    def interventions(self) -> Iterator[tuple[str, Intervention]]:
        """Path and intervention, targets first. Raises SteeringError that names the field."""
        for name, target in self.spec.targets.items():
            path = f"{self.targets_at}.{name[:_NAME_LIMIT]}"
            yield path, _target(name, target, path)
        for index, intervention in enumerate(self.spec.interventions):
            yield f"{self.base}{'.' if self.base else ''}interventions[{index}]", intervention

    def program(self, bench: Bench) -> Program:
        """This part alone, compiled. Raises SteeringError that names the field."""
        try:
            found = list(self.interventions())
            return compile_program([one for _, one in found], bench, self.spec.guard, [path for path, _ in found])
        except SteeringError as error:
            if (error.param or "").startswith("guard.") and self.base:
                error = error.at(self.base)
            raise self._told(error) from None

    def check_scopes(self, terms: Iterator[Term], length: int, steps: int) -> None:
        """As `Composition.check_scopes`, for this part, whose terms come next."""
        for (path, one), term in zip(self.interventions(), terms, strict=False):
            scope = getattr(one, "apply", None)
            if isinstance(scope, Scope) and (error := _impossible(scope, length, steps)) is not None:
                raise self._told(error.at(f"{path}.apply"))
            if term.acts and not any(_selects(s, length, steps) for s in term.scopes or (term.scope,)):
                expected = f"one of the prompt's {length} tokens that {one.type} acts on"
                raise self._told(SpecError(path, expected=expected, advice="it leaves some out, as position 0"))

    def _told(self, error: SteeringError) -> SteeringError:
        """The error with the path of its field; inside a saved object it names what brought that in."""
        param = self._short(error.param)
        if self.saved is not None:
            field, name = self.saved
            said = error.message.partition(": ")[2] or error.message
            error.message = f"{field}: in {name}, {param}: {said}" if param else f"{field}: in {name}, {error.message}"
            param = field
        error.param = param
        return error

    def _short(self, param: str | None) -> str | None:
        """A target's name is its key, and a target that is a number is its own setpoint: the path ends at the key."""
        if param and param.endswith(".name"):  # what an unusable artifact says of itself; here it is a concept
            param = f"{param.removesuffix('.name')}.concept"
        for name, target in self.spec.targets.items():
            path = f"{self.targets_at}.{name[:_NAME_LIMIT]}"
            if param == f"{path}.concept" or (param == f"{path}.setpoint" and not isinstance(target, BaseModel)):
                return path
        return param


@dataclass(frozen=True)
class Composition:
    """What steers a request: the server's default, a preset, its own object, those that there are, in this order."""

    parts: tuple[Part, ...]
    trace: Literal["none", "tokens"] = "none"

    def program(self, bench: Bench) -> Program:
        """All parts superposed, under the stricter of every bound.

        Raises SteeringError with `param` set to the field's path, SpecError for more interventions than allowed.
        """
        count = sum(len(part.spec.targets) + len(part.spec.interventions) for part in self.parts)
        if count > MAX_INTERVENTIONS:
            together = ", default and preset included" if any(part.saved for part in self.parts) else ""
            raise SpecError(
                self.parts[-1].base or "interventions",
                expected=f"at most {MAX_INTERVENTIONS} targets and interventions{together}",
                got=count,
            )
        programs = [part.program(bench) for part in self.parts]
        guards = [part.spec.guard for part in self.parts if part.spec.guard is not None]
        terms = tuple(term for program in programs for term in program.terms)
        whole = Program(terms, reduce(_stricter, guards, Guard()))
        try:
            check_whole(terms, whole.guard)
        except SteeringError as error:
            raise error.at(self.parts[-1].base) if self.parts[-1].base else error from error
        if whole.rank > MAX_CHANNELS:
            expected = f"at most {MAX_CHANNELS} channels, the components of all plans and one for each concept"
            raise SpecError(self.parts[-1].base or "interventions", expected=expected, got=whole.rank)
        return whole

    def check_scopes(self, program: Program, length: int, steps: int) -> None:
        """Refuse what can select nothing in a prompt of `length` tokens and `steps` decode steps: it would be served
        unsteered without a word. There is one step fewer than tokens, for the first is drawn from the prompt.
        `program` is what this compiles to: methods leave positions out that a request's `apply` has.

        `none` for both prompt and generation stays legal, and so do positions of which one is inside: a preset's may
        be meant for longer prompts.
        Raises SpecError.
        """
        terms = iter(program.terms)
        for part in self.parts:
            part.check_scopes(terms, length, steps)


def _stricter(a: Guard, b: Guard) -> Guard:
    """The smaller of each bound; None is no bound."""

    def least(x: float | None, y: float | None) -> float | None:
        return min(x, y) if x is not None and y is not None else y if x is None else x

    return Guard(max_effort=least(a.max_effort, b.max_effort), max_kl=least(a.max_kl, b.max_kl))


def _impossible(scope: Scope, length: int, steps: int) -> SpecError | None:
    """Why a scope can select nothing, or has a part that cannot; None where it is fine."""
    acts_on_prompt = bool(scope.prompt_mask(length).any())
    if isinstance(scope.prompt, Positions) and not acts_on_prompt:
        got = list(scope.prompt.positions)
        return SpecError("prompt.positions", expected=f"at least one of the prompt's {length} tokens", got=got)
    if isinstance(scope.prompt, Window) and not acts_on_prompt:
        return SpecError(
            "prompt.window", expected=f"at least one of the prompt's {length} tokens", got=list(scope.prompt.window)
        )
    if (scope.prompt, scope.generation) == ("none", "none") or acts_on_prompt:
        return None
    if isinstance(scope.generation, Window):
        start, stop = scope.generation.window
        if start >= min(stop, steps):
            expected = f"at least one of the {steps} steps after the first token"
            return SpecError("generation.window", expected=expected, got=[start, stop])
    elif steps == 0:
        return SpecError(
            "generation", expected="a step to act on, but the only token is drawn from the prompt", got="all"
        )
    return None


def _selects(scope: Scope, length: int, steps: int) -> bool:
    """Whether any token of a prompt or any decode step is in scope."""
    if scope.prompt_mask(length).any():
        return True
    start, stop = scope.generation.window if isinstance(scope.generation, Window) else (0, steps)
    return scope.generation != "none" and start < min(stop, steps)


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
