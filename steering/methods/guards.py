"""Guards of every compiled intervention: massive activations stay, and what no reader sees is not spent.

    g_i ← 0  for i in M_l,      g_i ← g_i − (1/|M̄_l|) Σ_{j ∉ M_l} g_j   elsewhere, in models with LayerNorm

M_l are the massive coordinates of the residual stream where the write stands (`steering.plant.massive`). A law's gain
is put to zero there; a mask leaves them as they are; a turn's plane is taken out of them and made orthonormal again.
What a law measures stays whole, so that a clamp falls short of its value by the share of its direction in M_l.

LayerNorm takes the mean over coordinates from whatever it reads: that part of a push only uses up the effort. Where
there are massive coordinates too, the mean over the others goes, so that both hold.

Where position 0 has massive activations it is left out of `prompt: all`; positions and windows that a caller wrote out
stay. A mask that takes a whole site away is no edit of coordinates and passes as it is: a block that is left out is
left out whole, everywhere.

A model with RMSNorm and without massive activations gets the very term that the method compiled.
Source: arXiv:2402.17762 (massive activations).   Oracle: the coordinates before and behind; the readers' outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from steering.edit import Acting, Mask, Turn
from steering.errors import SpecError
from steering.law import Law
from steering.methods.planned import without_first
from steering.plant.massive import RESIDUAL, Caution
from steering.program import Term
from steering.registry import Bench
from steering.types import Route

FLAT = 1e-4
"""Length below which nothing is left of a unit vector: float32's rounding of its mean is 1e-8."""


def guarded(term: Term, bench: Bench, *, spare_massive: bool = True) -> Term:
    """`term` with the guards of this model. Without `spare_massive`, massive activations are open to it.

    Raises SpecError where nothing is left of what it does.
    """
    caution = bench.caution if spare_massive else Caution(mean_free=bench.caution.mean_free)
    acting = [law for law in term.laws.values() if not law.is_idle]
    if not caution.is_needed or all(isinstance(law, Mask) and law.takes_all for law in acting):
        return term
    laws = {route: _careful(route, law, caution) for route, law in term.laws.items()}
    if acting and all(law.is_idle for law in laws.values()):
        raise SpecError(
            "spare_massive", expected="an intervention that does more than change massive activations", got=True
        )
    guarded = replace(term, laws=laws)
    if not caution.first:
        return guarded
    return replace(guarded, scope=without_first(term.scope), scopes=tuple(without_first(s) for s in term.scopes))


def _careful(route: Route, law: Acting, caution: Caution) -> Acting:
    """What acts on one route, with the guards."""
    dims = caution.at(route.write)
    if route.write.tap not in RESIDUAL or not (dims or caution.mean_free):
        return law
    if isinstance(law, Law):
        return law if law.is_idle else replace(law, gain=_without(law.gain, dims, caution.mean_free))
    if isinstance(law, Mask) and dims and not law.takes_all:
        scale, shift = law.scale.clone(), law.shift.clone()
        scale[:, list(dims)], shift[:, list(dims)] = 1.0, 0.0
        return replace(law, scale=scale, shift=shift)
    if isinstance(law, Turn):
        return replace(law, plane=torch.stack([_plane(b_2E, dims, caution.mean_free) for b_2E in law.plane]))
    return law


def _without(rows_RE: Tensor, dims: Sequence[int], mean_free: bool) -> Tensor:
    """The rows without these coordinates and, of the others, without their mean."""
    kept_E = torch.ones(rows_RE.shape[1], dtype=torch.bool)
    kept_E[list(dims)] = False
    rows_RE = rows_RE.where(kept_E, 0.0)
    if not mean_free:
        return rows_RE
    return (rows_RE - rows_RE.sum(-1, keepdim=True) / kept_E.sum()).where(kept_E, 0.0)


def _plane(b_2E: Tensor, dims: Sequence[int], mean_free: bool) -> Tensor:
    """The plane of what is left of two orthonormal vectors, the first of them as near as can be to what it was."""
    first_E, second_E = _without(b_2E, dims, mean_free)
    sizes = [float(first_E.norm())]
    first_E = first_E / first_E.norm().clamp_min(FLAT)
    second_E = second_E - (second_E @ first_E) * first_E
    sizes.append(float(second_E.norm()))
    if min(sizes) <= FLAT:
        raise SpecError("spare_massive", expected="a plane that is not all massive coordinates", got=True)
    return torch.stack([first_E, second_E / second_E.norm()])
