"""One plan of every kind for the toy network of `tests.toy`, by hand, in float64 until a test stores it."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from steering.plan import EigenshiftPlan, Form, Plan, ReftPlan, SubspacePlan
from tests.toy import MODEL

DEPTH, WIDTH, WORDS = 4, 6, 11
P = TypeVar("P", bound=Plan)


def orthonormal(rows: int, width: int, seed: int) -> Tensor:
    """Random orthonormal rows (rows, width), float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, rows, generator=generator, dtype=torch.float64)).Q.mT.contiguous()


def noise(*shape: int, seed: int) -> Tensor:
    """Random numbers, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head(seed: int = 3) -> Tensor:
    """A head W (V, D)."""
    return noise(WORDS, WIDTH, seed=seed)


def common(name: str, depth: int = DEPTH, width: int = WIDTH) -> dict[str, Any]:
    """The fields that all kinds share."""
    return {"name": name, "model": MODEL, "depth": depth, "width": width, "quality": {"auroc": 0.5}, "provenance": {}}


def eigenshift(k: int = 3) -> EigenshiftPlan:
    """Three of the six eigen-directions of `head()`, not the largest ones."""
    _, sigma, V = torch.linalg.svd(head(), full_matrices=False)
    chosen, control = torch.tensor([4, 1, 2][:k]), torch.tensor([0, 5, 3][:k])
    shift = noise(WIDTH, seed=4)
    return EigenshiftPlan(
        **common("toxic"),
        selection="separation",
        basis=V[chosen],
        sigma=sigma[chosen],
        shift=shift[chosen],
        pooled=noise(k, seed=5).abs(),
        control=V[control],
        control_shift=shift[control],
    )


def stored(plan: P) -> P:
    """The same in float32, as a fit stores it."""
    tensors = {f.name: getattr(plan, f.name).float() for f in fields(plan) if isinstance(getattr(plan, f.name), Tensor)}
    return replace(plan, **tensors)


def subspace(n: int = 3) -> SubspacePlan:
    """Blocks 1 … n: a random full eigenbasis each, three leading rows and the three trailing ones, two spikes."""
    bases = torch.stack([orthonormal(WIDTH, WIDTH, 10 + layer) for layer in range(n)])
    spectrum = torch.arange(WIDTH, 0, -1, dtype=torch.float64).square().repeat(n, 1)
    return SubspacePlan(
        **common("pca"),
        layers=tuple(range(1, n + 1)),
        mean=noise(n, WIDTH, seed=20),
        spectrum=spectrum,
        leading=bases[:, :3].contiguous(),
        trailing=bases.flip(1)[:, :3].contiguous(),
        score=torch.tensor([[0.1, 0.9, 5.0]], dtype=torch.float64).repeat(n, 1),
        spikes=(2,) * n,
        flagged=(1,) * n,
    )


def reft(form: Form = "loreft", *, rank: int = 2, first: int = 2, last: int = 1) -> ReftPlan:
    """Blocks 1 and 3: orthonormal R for LoReFT, any R for DiReFT."""
    rotation = torch.stack([orthonormal(rank, WIDTH, 30 + i) for i in range(2)])
    return ReftPlan(
        **common("edit"),
        layers=(1, 3),
        form=form,
        is_rotation=form == "loreft",
        first=first,
        last=last,
        rotation=rotation if form == "loreft" else noise(2, rank, WIDTH, seed=33),
        weight=noise(2, rank, WIDTH, seed=31),
        bias=noise(2, rank, seed=32),
    )
