"""EigenShift before the head is the published edit of the head, and its shift moves a mean by whole differences."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from steering.errors import SpecError
from steering.methods import Eigenshift, compile_program
from steering.types import at
from tests.plans import WIDTH, eigenshift, head, noise, stored
from tests.tolerances import CORE
from tests.toy import toy

PLAN = eigenshift()
BENCH = replace(toy(), plans={"toxic": PLAN})
H = noise(7, WIDTH, seed=8)
W = head()


def steered(**fields: Any) -> torch.Tensor:
    (law,) = Eigenshift(plan="toxic", **fields).compile(BENCH).laws.values()
    return law(H, H)


@pytest.mark.parametrize("alpha", [None, 0.0, 0.1, 0.9, -1.0, 1.5])
def test_equals_the_edited_head(alpha: float | None) -> None:
    """W' = U Σ' Vᵀ with σ' = α σ for the chosen components; their places in the SVD are 4, 1 and 2."""
    U, sigma, V = torch.linalg.svd(W, full_matrices=False)
    edited = sigma.clone()
    edited[[4, 1, 2]] *= 0.0 if alpha is None else alpha
    torch.testing.assert_close(steered(alpha=alpha) @ W.mT, H @ ((U * edited) @ V).mT, **CORE["law"])


@pytest.mark.parametrize("strength", [1.0, 0.25])
@pytest.mark.parametrize(("alpha", "shift"), [(None, -1.0), (1.0, 2.0), (0.3, -0.5), (0.0, 1.0)])
def test_equals_damping_and_shift_formed_explicitly(alpha: float | None, shift: float, strength: float) -> None:
    V, left = PLAN.basis, 1.0 if alpha is None else alpha
    u = -(1 - left) * H @ V.mT @ V + shift * PLAN.shift @ V
    torch.testing.assert_close(steered(alpha=alpha, shift=shift, strength=strength), H + strength * u, **CORE["law"])


def test_one_shift_takes_one_mean_to_the_other() -> None:
    before, after = H @ PLAN.basis.mT, steered(shift=-1.0) @ PLAN.basis.mT
    torch.testing.assert_close(after, before - PLAN.shift, **CORE["law"])


def test_the_first_components_are_those_selected_first() -> None:
    v = PLAN.basis[:1]
    torch.testing.assert_close(steered(alpha=0.0, components=1), H - H @ v.mT @ v, **CORE["law"])


def test_the_control_uses_the_random_components() -> None:
    V = PLAN.control
    torch.testing.assert_close(steered(alpha=0.0, control=True), H - H @ V.mT @ V, **CORE["law"])
    torch.testing.assert_close(
        steered(shift=1.0, control=True), (H + PLAN.control_shift @ V).expand_as(H), **CORE["law"]
    )


def test_it_is_one_law_at_the_final_norm_of_the_plan_s_name() -> None:
    term = Eigenshift(plan="toxic").compile(BENCH)
    assert list(term.laws) == [at("final")]
    assert (term.label, term.type, term.rank) == ("toxic", "eigenshift", 3)


def test_alpha_shift_and_strength_share_one_slot() -> None:
    bench = replace(BENCH, plans={"toxic": stored(PLAN)})
    damped = [Eigenshift(plan="toxic", alpha=a, shift=s) for a in (0.0, 0.5) for s in (0.0, 1.0)]
    assert len({compile_program([one], bench).shape for one in damped}) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"alpha": 1.0}, "alpha"),
        ({"alpha": 2.5}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"shift": float("inf")}, "shift"),
        ({"layers": (1,)}, "layers"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(SpecError) as caught:
        Eigenshift(plan="toxic", **fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"components": 0}, "components"), ({"components": 4}, "components"), ({"alpha": 0.5, "shift": 3e38}, "shift")],
)
def test_what_the_plan_does_not_have_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    bench = replace(BENCH, plans={"toxic": replace(PLAN, shift=4 * torch.ones(3, dtype=torch.float64))})
    with pytest.raises(SpecError) as caught:
        Eigenshift(plan="toxic", **fields).compile(bench)
    assert caught.value.param == param


def test_the_cap_bounds_the_whole_control() -> None:
    (law,) = Eigenshift(plan="toxic", alpha=0.0, max_effort=0.05).compile(BENCH).laws.values()
    effort = (law(H, H) - H).norm(dim=-1) / H.norm(dim=-1)
    assert float(effort.max()) <= 0.05 * (1 + CORE["bound"])
    assert float(effort.max()) > 0.02
