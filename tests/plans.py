"""One plan of every kind for the toy network of `tests.toy`, by hand, in float64 until a test stores it."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from steering.plan import (
    ActAddPlan,
    AdapterPlan,
    ChannelsPlan,
    EigenshiftPlan,
    Form,
    HeadsPlan,
    InteractionPlan,
    LanguagePlan,
    NeuronsPlan,
    Plan,
    ReftPlan,
    SaePlan,
    SubspacePlan,
    TransportPlan,
)
from steering.plan.layers import LayersPlan
from steering.plan.sparsity import SparsityPlan
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


def transport() -> TransportPlan:
    """Blocks 1 and 3, outputs: scales 0 to 2, shifts, bounds around where most states of the toy are."""
    return TransportPlan(
        **common("moved"),
        layers=(1, 3),
        site="resid_post",
        form="linear",
        scale=2 * noise(2, WIDTH, seed=41).abs().clamp_max(1.0),
        shift=noise(2, WIDTH, seed=42),
        low=-4 - noise(2, WIDTH, seed=43).abs(),
        high=4 + noise(2, WIDTH, seed=44).abs(),
        control_scale=noise(2, WIDTH, seed=45).abs(),
        control_shift=noise(2, WIDTH, seed=46),
    )


def oblique(layer: int) -> tuple[Tensor, Tensor]:
    """An invertible C (D, D) that is no rotation, and its inverse."""
    C = noise(WIDTH, WIDTH, seed=60 + layer) + 2 * torch.eye(WIDTH, dtype=torch.float64)
    return C, torch.linalg.inv(C)


def interaction(n: int = 3) -> InteractionPlan:
    """Blocks 1 … n: features of `oblique`, three leading ones and the two last, rank 6; components of random bases."""
    rows = []
    for C, inverse in map(oblique, range(1, n + 1)):
        size = inverse.norm(dim=-1, keepdim=True)
        rows.append((C.mT * size, inverse / size))
    probe, gain = (torch.stack([row[i] for row in rows]) for i in (0, 1))
    bases = torch.stack([orthonormal(WIDTH, WIDTH, 70 + layer) for layer in range(n)])
    return InteractionPlan(
        **common("local"),
        layers=tuple(range(1, n + 1)),
        mean=noise(n, WIDTH, seed=61),
        ranks=(WIDTH,) * n,
        spectrum=torch.arange(WIDTH, 0, -1, dtype=torch.float64).repeat(n, 1),
        probe=probe[:, :3].contiguous(),
        gain=gain[:, :3].contiguous(),
        probe_rest=probe.flip(1)[:, :2].contiguous(),
        gain_rest=gain.flip(1)[:, :2].contiguous(),
        pca=bases[:, :3].contiguous(),
        pca_rest=bases.flip(1)[:, :2].contiguous(),
    )


def channels() -> ChannelsPlan:
    """Two heads of width 3; four channels of blocks 1 and 2, the third of the same component as the first."""
    n, d = 4, 3
    direction, control = orthonormal(n, WIDTH, 80), orthonormal(n, WIDTH, 81)
    probe = noise(n, d, seed=82)
    same = torch.tensor([0, 1, 0, 3])
    return ChannelsPlan(
        **common("talk"),
        above=3,
        heads=2,
        head_width=d,
        source_layer=(1, 1, 1, 2),
        source_head=(0, 1, 0, 1),
        component=(0, 2, 0, 1),
        reader_layer=(2, 3, 3, 3),
        reader_head=(1, 0, 1, 0),
        reader=("query", "value", "key", "query"),
        probe=probe[same],
        direction=direction[same],
        sigma=torch.tensor([3.0, 2.0, 3.0, 1.0], dtype=torch.float64),
        share=torch.tensor([0.6, 0.5, 0.6, 0.2], dtype=torch.float64),
        score=torch.tensor([0.7, 0.5, 0.4, 0.2], dtype=torch.float64),
        null=torch.tensor([0.1, 0.1, 0.1, 0.1], dtype=torch.float64),
        control_head=(1, 0, 1, 0),
        control_component=(1, 1, 1, 2),
        control_probe=noise(n, d, seed=83)[same],
        control_direction=control[same],
    )


def adapter() -> AdapterPlan:
    """Updates of rank 2 of q and down of block 1, of rank 3 of o of block 3; all maps are square."""
    ranks = (2, 2, 3)
    return AdapterPlan(
        **common("lora"),
        modules=("layers.1.q", "layers.1.down", "layers.3.o"),
        ranks=ranks,
        inner=(WIDTH,) * 3,
        outer=(WIDTH,) * 3,
        a=noise(sum(ranks) * WIDTH, seed=90),
        b=noise(sum(ranks) * WIDTH, seed=91),
    )


def sae(m: int = 9) -> SaePlan:
    """Outputs of blocks 1 (ReLU) and 2 (JumpReLU), scales 2 and 0.5; selectivity is largest for features 4, 7 and 1."""
    decoder = noise(2, m, WIDTH, seed=102)
    selectivity = -noise(2, m, seed=108).abs()
    selectivity[:, [4, 7, 1]] = torch.tensor([0.9, 0.6, 0.3], dtype=torch.float64)
    return SaePlan(
        **common("dictionary"),
        tap="resid_post",
        measured="classes",
        layers=(1, 2),
        encoder=noise(2, m, WIDTH, seed=100),
        encoder_bias=noise(2, m, seed=101),
        decoder=decoder / decoder.norm(dim=-1, keepdim=True),
        decoder_bias=noise(2, WIDTH, seed=103),
        threshold=torch.tensor([[0.0], [0.4]], dtype=torch.float64) * torch.ones(2, m, dtype=torch.float64),
        scale=torch.tensor([2.0, 0.5], dtype=torch.float64),
        peak=1 + noise(2, m, seed=105).abs(),
        mean=noise(2, m, seed=106).abs(),
        rate=torch.full((2, m), 0.25, dtype=torch.float64),
        selectivity=selectivity,
        control=torch.tensor([[0, 5, 4, 8, 1, 2, 3, 6, 7], [3, 2, 7, 6, 0, 1, 4, 5, 8]], dtype=torch.float64),
    )


def language() -> LanguagePlan:
    """Three features of `sae()` at block 1 and two at block 2, whose third place is empty."""
    plan, counts = sae(), (3, 2)
    numbers, control = torch.tensor([[4, 7, 1], [7, 1, 0]]), torch.tensor([[0, 5, 8], [3, 2, 0]])
    full = (torch.arange(3) < torch.tensor(counts)[:, None]).double()

    def unit(seed: int) -> Tensor:
        rows = full * noise(2, 3, seed=seed)
        return rows / rows.norm(dim=-1, keepdim=True)

    found: dict[str, Tensor] = {}
    for prefix, chosen in (("", numbers), ("control_", control)):
        parts = [(plan.autoencoder(row), chosen[row]) for row in range(2)]
        probes = [ae.probes(features) for ae, features in parts]
        writes = [ae.writes(features) for ae, features in parts]
        for place, name in enumerate(("probe", "bias", "knee")):
            found[prefix + name] = torch.stack([probe[place] for probe in probes])
        found[f"{prefix}write"] = torch.stack(writes)
    found = {name: tensor * (full if tensor.ndim == 2 else full[..., None]) for name, tensor in found.items()}
    return LanguagePlan(
        **common("castellano"),
        tap="resid_post",
        layers=(1, 2),
        counts=counts,
        number=numbers * full,
        target=unit(110),
        source=unit(111).abs(),
        shift=torch.tensor([1.5, 0.8], dtype=torch.float64),
        **found,
    )


def neurons() -> NeuronsPlan:
    """Four units of blocks 1 and 3, the third with more in the negative class; unit 5 of block 1 is massive."""
    return NeuronsPlan(
        **common("experts"),
        site="mlp_act",
        method="mean_difference",
        layers=(1, 3),
        spans=(WIDTH, WIDTH),
        layer=torch.tensor([3.0, 1.0, 1.0, 3.0], dtype=torch.float64),
        index=torch.tensor([4.0, 0.0, 2.0, 1.0], dtype=torch.float64),
        score=torch.tensor([0.9, 0.5, -0.4, 0.3], dtype=torch.float64),
        auroc=torch.tensor([0.9, 0.8, 0.3, 0.45], dtype=torch.float64),
        positive=noise(4, seed=100),
        negative=noise(4, seed=101),
        deviation=noise(4, seed=102).abs(),
        control=torch.tensor([2.0, 3.0, 4.0, 5.0], dtype=torch.float64),
        control_negative=noise(4, seed=103),
        massive=torch.tensor([[1.0, 5.0]], dtype=torch.float64),
    )


def heads() -> HeadsPlan:
    """Two heads of width 3 in blocks 1 and 3; the second of block 3 is the best one."""
    direction = noise(2, 2, 3, seed=110)
    negative = noise(2, 2, seed=112)
    return HeadsPlan(
        **common("truth"),
        layers=(1, 3),
        probe="mean_difference",
        accuracy=torch.tensor([[0.6, 0.7], [0.5, 0.9]], dtype=torch.float64),
        direction=direction / direction.norm(dim=-1, keepdim=True),
        deviation=noise(2, 2, seed=111).abs() + 0.1,
        positive=negative + noise(2, 2, seed=113).abs() + 0.1,
        negative=negative,
        mean=noise(2, 2, 3, seed=114),
        order=torch.tensor([3.0, 1.0, 0.0, 2.0], dtype=torch.float64),
        control=torch.tensor([2.0, 3.0, 0.0, 1.0], dtype=torch.float64),
    )


def act_add(positions: int = 2) -> ActAddPlan:
    """Blocks 1 … 3; the prompts begin with the same token."""
    difference = noise(3, positions, WIDTH, seed=120)
    difference[:, 0] = 0
    size = difference.norm(dim=-1, keepdim=True)
    control = noise(3, positions, WIDTH, seed=121)
    return ActAddPlan(
        **common("love"),
        layers=(1, 2, 3),
        difference=difference,
        control=control / control.norm(dim=-1, keepdim=True) * size,
    )


def sparsity(*, rank: int = 1) -> SparsityPlan:
    """Blocks 1 and 2, inputs of attention and down: half of the attention's go at 0.5, more of the MLP's."""
    share = torch.tensor([[0.25, 0.5, 0.75], [0.3, 0.6, 0.9]], dtype=torch.float64).expand(2, 2, 3)
    bases = [
        torch.cat([orthonormal(rank, WIDTH, 100 + 2 * row + site) for site in range(2)], dim=1) for row in range(2)
    ]
    return SparsityPlan(
        **common("light"),
        layers=(1, 2),
        sites=("attn_in", "mlp_act"),
        widths=(WIDTH, WIDTH),
        size=(3 * WIDTH**2, WIDTH**2),
        score="wina",
        rule="threshold",
        allocation="uniform",
        target=0.5,
        levels=(0.25, 0.5, 0.75),
        weight=0.5 + noise(2, 2 * WIDTH, seed=104).abs(),
        share=share,
        threshold=torch.tensor([0.4, 0.9, 2.0], dtype=torch.float64).expand(2, 2, 3),
        realised=torch.full((2, 2), 0.5, dtype=torch.float64),
        rest=torch.stack(bases),
        control=noise(2, 2 * WIDTH, seed=105).sigmoid(),
    )


def layers() -> LayersPlan:
    """The attentions of blocks 2, 1, 3, 0 go in this order, the MLPs as 3, 2, 1, 0."""
    return LayersPlan(
        **common("drops"),
        score=torch.tensor([[0.1, 0.8, 0.95, 0.7], [0.2, 0.5, 0.6, 0.9]], dtype=torch.float64),
        influence=torch.tensor([0.9, 0.2, 0.1, 0.3], dtype=torch.float64),
        order=(2, 7, 1, 3, 6, 5, 4, 0),
        control=(4, 1, 0, 6, 3, 7, 2, 5),
    )
