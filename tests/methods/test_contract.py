"""What every registered intervention promises, whatever it computes."""

from __future__ import annotations

import math
import sys
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from steering.condition import When
from steering.errors import SpecError, StaleFingerprint
from steering.methods import Add, Clamp, Lqr, Pid, compile_program
from steering.program import Positions, Program, Scope, Window
from steering.registry import REGISTRY, Intervention, register, summary
from tests import plans
from tests.control.cases import directions
from tests.toy import Toy, run, states, toy

MADE = (
    plans.eigenshift(),
    plans.subspace(),
    plans.reft(),
    plans.neurons(),
    plans.heads(),
    plans.act_add(),
    plans.transport(),
    plans.interaction(),
    plans.channels(),
    plans.adapter(),
    plans.sparsity(),
    plans.layers(),
    plans.sae(),
    plans.language(),
)
PLANS = {plan.name: plans.stored(plan) for plan in MADE}
BENCH = replace(toy().resident(), plans=PLANS)
REQUIRED: dict[str, Any] = {"concept": "tone", "setpoint": 1.25}
"""Values for the fields without a default."""
OF_PLAN = {
    "eigenshift": "toxic",
    "subspace": "pca",
    "reft": "edit",
    "neurons": "experts",
    "heads": "truth",
    "act_add": "love",
    "linear_transport": "moved",
    "interaction": "local",
    "channels": "talk",
    "adapter_mix": "lora",
    "sparsity": "light",
    "skip_layers": "drops",
    "sae": "dictionary",
    "language": "castellano",
}
"""The plan of each method that acts on one."""
BESIDE: dict[str, dict[str, Any]] = {
    "heads": {"mode": "clamp"},
    "act_add": {"layer": 2},
    "skip_layers": {"attention": 2},
}
"""What else some need."""


def minimal(cls: Any) -> dict[str, Any]:
    """The fields that have to be given."""
    needed = {name: value for name, value in REQUIRED.items() if has(cls, name)}
    return needed | ({"plan": OF_PLAN[cls.type]} if cls.type in OF_PLAN else {}) | BESIDE.get(cls.type, {})


def make(cls: type, **changes: Any) -> Any:
    if "apply" in changes and has(cls, "positions"):
        changes = {"positions": "apply", **changes}
    return cls(**{**minimal(cls), **changes})


def has(cls: type, name: str) -> bool:
    return name in {f.name for f in fields(cls)}


every = pytest.mark.parametrize("cls", REGISTRY.values(), ids=REGISTRY)
on_concept = pytest.mark.parametrize(
    "cls", [cls for cls in REGISTRY.values() if cls.type not in OF_PLAN], ids=[n for n in REGISTRY if n not in OF_PLAN]
)
on_plan = pytest.mark.parametrize("cls", [REGISTRY[name] for name in OF_PLAN], ids=OF_PLAN)
CONSTANT = ("skip_layers", "sparsity")
"""Methods that do all of what they do or nothing: without a part or a bound."""
in_part = pytest.mark.parametrize(
    "cls",
    [cls for cls in REGISTRY.values() if cls.type not in CONSTANT],
    ids=[n for n in REGISTRY if n not in CONSTANT],
)


def test_the_registered_names() -> None:
    assert sorted(REGISTRY) == [
        "ablate",
        "act_add",
        "adapter_mix",
        "add",
        "angular",
        "channels",
        "clamp",
        "eigenshift",
        "heads",
        "interaction",
        "language",
        "linear_transport",
        "lqr",
        "neurons",
        "pid",
        "reft",
        "sae",
        "skip_layers",
        "sparsity",
        "subspace",
    ]
    assert all(cls.type == name for name, cls in REGISTRY.items())


@every
def test_compiles_to_the_same_program_twice(cls: type) -> None:
    first, second = (compile_program([make(cls)], bench) for bench in (BENCH, replace(toy().resident(), plans=PLANS)))
    assert first.fingerprint == second.fingerprint
    assert first.shape == second.shape
    assert first.acts
    assert first.terms[0].label == OF_PLAN.get(cls.type, "tone")  # type: ignore[attr-defined]
    assert first.terms[0].type == cls.type


@every
def test_strength_zero_does_nothing(cls: type) -> None:
    term = make(cls, strength=0.0).compile(BENCH)
    assert not term.acts
    x = states(3, BENCH.width).float()
    A_LDD = BENCH.A_LDD.float()
    steered, plain = run(A_LDD, term.laws, x), run(A_LDD, {}, x)
    assert all(torch.equal(a, b) for a, b in zip(steered[1], plain[1], strict=True))


@in_part
def test_strength_is_a_knob(cls: type) -> None:
    weak, strong = (compile_program([make(cls, strength=a)], BENCH) for a in (0.25, 1.0))
    assert weak.shape == strong.shape
    assert weak.fingerprint != strong.fingerprint


@on_concept
def test_it_reports_at_the_inputs_it_acts_on(cls: type) -> None:
    if cls.type == "angular":  # type: ignore[attr-defined]
        return  # an edit reports what it met at its own site, in its own units
    term = make(cls, layers=(1, 3)).compile(BENCH)
    assert {(str(route.read), str(route.write)) for route in term.gauges} == {
        ("resid_pre.1", "resid_post.1"),
        ("resid_pre.3", "resid_post.3"),
    }
    for route, (origin, scale) in term.gauges.items():
        layer = route.read.layer
        assert torch.equal(term.laws[route].probe[0], BENCH.tone.direction[layer])
        assert (origin, scale) == (float(BENCH.tone.origin[layer]), float(BENCH.tone.magnitude[layer]))


@in_part
def test_the_cap_bounds_the_effort_of_a_layer(cls: type) -> None:
    cap = 0.01
    layers = None if cls.type in OF_PLAN else (2,)  # type: ignore[attr-defined]
    term = make(cls, max_effort=cap, layers=layers).compile(BENCH)
    x = states(5, BENCH.width).float()
    for route, law in term.laws.items():
        y = torch.zeros(5, BENCH.width)
        # What an edit adds is the difference of two states: known to their rounding, 6e-8, of which cap is a hundredth.
        slack = 1e-6 if route.form == "law" else 2e-5
        assert float(((law(y, x) - y).norm(dim=-1) / x.norm(dim=-1)).max()) <= cap * (1 + slack), route
    free = make(cls, layers=layers).compile(BENCH)
    assert any(float((law(x, x) - x).norm()) > cap * float(x.norm()) for law in free.laws.values())


@in_part
def test_json_round_trip(cls: type) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(cls)
    scope = Scope(prompt=Positions((0, -2)), generation=Window((1, 4)))
    layers = None if cls.type in ("eigenshift", "act_add") else (1, 2)  # type: ignore[attr-defined]
    scope = None if cls.type == "act_add" else scope  # type: ignore[assignment, attr-defined]
    own = {"positions": "apply"} if cls.type == "reft" else {}  # type: ignore[attr-defined]
    whole = make(cls, strength=0.5, layers=layers, apply=scope, max_effort=0.25, **own)
    for spec in (make(cls), whole):
        assert adapter.validate_json(adapter.dump_json(spec)) == spec
    assert adapter.validate_python({**minimal(cls), "type": cls.type})  # type: ignore[attr-defined]


@every
def test_unknown_keys_types_and_selectors_are_refused(cls: type) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(cls)
    good = adapter.dump_python(make(cls), mode="json")
    adapter.validate_python(good)
    for change in (
        {"extra": 1},
        {"type": "other"},
        {"plan" if has(cls, "plan") else "concept": None},
        {"apply": {"prompt": "first"}},
        {"apply": {"prompt": {"window": [0, 1], "positions": [0]}}},
        {"apply": {"generation": "last"}},
        {"apply": {"other": 1}},
        {"layers": "all"},
        {"layers": [0.5]},
        {"strength": "strong"},
    ):
        with pytest.raises(ValidationError):
            adapter.validate_python({**good, **change})


@every
def test_the_schema_documents_every_field(cls: type) -> None:
    properties = TypeAdapter(cls).json_schema()["properties"]
    assert set(properties) == {f.name for f in fields(cls)}
    assert [name for name, field in properties.items() if name != "type" and "description" not in field] == []


@every
def test_documentation(cls: type) -> None:
    assert is_dataclass(cls)
    assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert isinstance(make(cls), Intervention)
    line = summary(cls)
    assert line == (sys.modules[cls.__module__].__doc__ or "").splitlines()[0]
    assert line.endswith(".")
    text = sys.modules[cls.__module__].__doc__ or ""
    assert all(word in text for word in ("Source:", "Oracle:", "Cost:"))


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="registered already"):
        register(Lqr)
    assert REGISTRY["lqr"] is Lqr


# Refusals


NUMBERS = (
    "strength",
    "setpoint",
    "angle",
    "kp",
    "ki",
    "kd",
    "alpha",
    "shift",
    "weights",
    "scale",
    "value",
    "suppress",
    "sparsity",
)


@every
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39, -1e300, "1"])
def test_impossible_numbers_are_refused_by_name(cls: type, value: Any) -> None:
    for name in NUMBERS:
        if has(cls, name):
            with pytest.raises(SpecError) as caught:
                make(cls, **{name: value})
            assert caught.value.param == name


@every
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_an_impossible_cap_is_refused_by_name(cls: type, value: float) -> None:
    with pytest.raises(SpecError) as caught:
        make(cls, max_effort=value)
    assert caught.value.param == "max_effort"


def without_direction(layers: tuple[int, ...]) -> Toy:
    """The bench with a concept whose classes do not differ at some layers."""
    direction, dense = BENCH.tone.direction.clone(), BENCH.tone.gains["dense"].clone()
    direction[list(layers)] = 0
    dense[[layer for layer in layers if layer < 4]] = 0
    return replace(BENCH, tone=replace(BENCH.tone, direction=direction, gains={"dense": dense}))


@on_concept
@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"concept": "absent"}, "concept"),
        ({"layers": ()}, "layers"),
        ({"layers": (1, 4)}, "layers"),
        ({"layers": (-1,)}, "layers"),
    ],
)
def test_errors_of_compilation_name_the_whole_path(cls: type, changes: dict[str, Any], param: str) -> None:
    wrong = make(cls, **changes)
    with pytest.raises(SpecError) as caught:
        compile_program([make(cls), wrong], BENCH)
    assert caught.value.param == f"interventions[1].{param}"
    with pytest.raises(SpecError) as caught:
        compile_program([wrong], BENCH, paths=["steering.targets.tone"])
    assert caught.value.param == f"steering.targets.tone.{param}"


@on_concept
def test_layers_at_which_nothing_would_happen_are_refused(cls: type) -> None:
    """Never served unsteered in silence: at layers 2 and 3 the classes do not differ."""
    direction, dense = BENCH.tone.direction.clone(), BENCH.tone.gains["dense"].clone()
    direction[2:4], dense[2:4] = 0, 0
    bench = replace(BENCH, tone=replace(BENCH.tone, direction=direction, gains={"dense": dense}))
    with pytest.raises(SpecError) as caught:
        make(cls, layers=(2,)).compile(bench)
    assert caught.value.param == "layers"
    assert make(cls, layers=(1,)).compile(BENCH).acts


@on_concept
def test_a_target_beyond_float32_is_refused(cls: type) -> None:
    if not has(cls, "setpoint"):
        return
    large = replace(BENCH, tone=replace(BENCH.tone, magnitude=100 * BENCH.tone.magnitude))
    with pytest.raises(SpecError) as caught:
        make(cls, setpoint=3e38).compile(large)
    assert caught.value.param == "setpoint"
    assert make(cls, setpoint=1e30).compile(large).acts  # contained at run time, not here


@on_concept
def test_the_bench_s_own_errors_pass_with_their_path(cls: type) -> None:
    class Stale(Toy):
        def concept(self, name: str) -> Any:
            raise StaleFingerprint("of another model", param="concept")

    with pytest.raises(StaleFingerprint) as caught:
        compile_program([make(cls)], Stale(BENCH.A_LDD, BENCH.K_LDD, BENCH.tone))
    assert caught.value.param == "interventions[0].concept"


@on_plan
def test_errors_of_a_plan_name_the_whole_path(cls: type) -> None:
    class Stale(Toy):
        def plan(self, name: str, kind: Any) -> Any:
            raise StaleFingerprint("of another model", param="plan")

    others = [name for name in PLANS if name != OF_PLAN[cls.type]]  # type: ignore[attr-defined]
    for name in ("absent", *others):
        with pytest.raises(SpecError) as caught:
            compile_program([make(cls), make(cls, plan=name)], BENCH)
        assert caught.value.param == "interventions[1].plan"
    with pytest.raises(StaleFingerprint) as stale:
        compile_program([make(cls)], Stale(BENCH.A_LDD, BENCH.K_LDD, BENCH.tone))
    assert stale.value.param == "interventions[0].plan"


@on_plan
@pytest.mark.parametrize("layers", [(), (9,), (-1,)])
def test_impossible_layers_of_a_plan_are_refused_by_name(cls: type, layers: tuple[int, ...]) -> None:
    with pytest.raises(SpecError) as caught:
        make(cls, layers=layers).compile(BENCH)
    assert caught.value.param == "layers"


@on_plan
def test_a_plan_s_method_may_be_conditioned(cls: type) -> None:
    early = cls.type in ("act_add", "reft")  # type: ignore[attr-defined]
    for on in ("prompt", "token") if cls.type != "skip_layers" else ():  # type: ignore[attr-defined]
        if on == "prompt" and early:  # they act where nothing was measured yet
            with pytest.raises(SpecError) as caught:
                compile_program([make(cls, when=When(concept="tone", layer=1, above=0.0))], BENCH)
            assert caught.value.param == "interventions[0].when.on"
            continue
        when = When(concept="tone", layer=1, above=0.0, on=on)  # type: ignore[arg-type]
        (term,) = compile_program([make(cls, when=when)], BENCH).terms
        assert term.gate is not None
        assert set(term.laws) == set(make(cls).compile(BENCH).laws)


# Units and layers


@pytest.mark.parametrize("cls", [Lqr, Clamp, Pid])
@pytest.mark.parametrize("units", ["centred", "contrast", "absolute"])
def test_units(cls: type, units: str) -> None:
    term = make(cls, setpoint=1.5, units=units, layers=(2,)).compile(BENCH)
    origin, magnitude = float(BENCH.tone.origin[2]), float(BENCH.tone.magnitude[2])
    expected = {"centred": origin + 1.5 * magnitude, "contrast": 1.5 * magnitude, "absolute": 1.5}[units]
    gauge = {"centred": (origin, magnitude), "contrast": (0.0, magnitude), "absolute": (0.0, 1.0)}[units]
    (route,) = term.gauges
    assert float(term.laws[route].setpoint[0]) == pytest.approx(expected, rel=1e-6)
    assert term.gauges[route] == pytest.approx(gauge)
    assert (term.units, term.target) == (units, 1.5)


@on_concept
def test_layers_default_to_the_concept_s_and_are_sorted(cls: type) -> None:
    whole = make(cls).compile(BENCH)
    assert sorted({route.read.layer for route in whole.gauges}) == [1, 2, 3]
    assert Program((make(cls, layers=(3, 1, 3)).compile(BENCH),)).shape == (
        Program((make(cls, layers=(1, 3)).compile(BENCH),)).shape
    )


def test_nothing_is_a_program_that_does_nothing() -> None:
    assert not compile_program([], BENCH).acts


def test_superposed_methods_do_what_each_does() -> None:
    """One layer, several methods that read the same state: their controls add."""
    specs = [make(Lqr, layers=(2,)), make(Add, layers=(2,), strength=0.5), make(Pid, layers=(2,), setpoint=-1.0)]
    both = compile_program(specs, BENCH)
    x, y = directions(4, BENCH.width, 3).float(), torch.zeros(4, BENCH.width)
    (route,) = both.laws
    alone = sum(spec.compile(BENCH).laws[route](y, x) for spec in specs)
    torch.testing.assert_close(both.laws[route](y, x), alone)


@pytest.mark.parametrize("value", [0, -1])
def test_pid_s_window_has_a_length(value: int) -> None:
    with pytest.raises(SpecError) as caught:
        make(Pid, reset_every=value)
    assert caught.value.param == "reset_every"
