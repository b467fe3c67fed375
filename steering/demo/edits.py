"""Train the two edits that cannot be fitted in closed form: a LoReFT edit and a LoRA adapter for the embedded model.

    LoReFT   h ← h + Rᵀ(W h + b − R h)        at the last prompt tokens, R orthonormal by QR      arXiv:2404.03592
    LoRA     y ← y + B A x                    at every token, in four linear maps of each block   arXiv:2106.09685

Both minimise the cross-entropy of answers that carry a concept; the weights of the model stay. They stand among the
ready plans so that `reft` and `adapter_mix` can be tried, and measured beside what needs no training.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from steering.fit.examples import Example, encode_example
from steering.plan import ReftPlan
from steering.plant.plant import Plant
from steering.plant.taps import linear_weight, linears_at
from steering.types import Site, Tap

STEPS, ROWS, RATE = 160, 12, 4e-3
LAST = 4
"""Prompt tokens, from the end, that the LoReFT edit acts on."""
TARGETS: dict[str, tuple[Tap, Tap, int]] = {
    "q": ("attn_in", "q_out", 0),
    "v": ("attn_in", "v_out", 2),
    "o": ("attn_act", "attn_out", 0),
    "down": ("mlp_act", "mlp_out", 0),
}
"""The adapter's targets: where each linear map reads and writes, and its place among the readers of its site."""


def train_reft(
    plant: Plant, name: str, answers: Sequence[Example], *, layers: tuple[int, ...] = (2, 4, 6), rank: int = 4
) -> ReftPlan:
    """A LoReFT edit that makes answers like `answers` (chats that end with the assistant) likelier."""
    generator = torch.Generator().manual_seed(0)
    n, D = len(layers), plant.width
    free = torch.randn(n, D, rank, generator=generator).requires_grad_()
    weight = torch.zeros(n, rank, D, requires_grad=True)
    bias = torch.zeros(n, rank, requires_grad=True)

    def rotations() -> Tensor:
        return torch.linalg.qr(free).Q.mT

    with torch.no_grad():
        weight += rotations()  # W = R, b = 0: the edit starts as the identity

    shell, edited = plant.shell(), torch.zeros(0)

    def install(i: int) -> Callable[[Tensor], Tensor]:
        def act(h_BTD: Tensor) -> Tensor:
            R_RD = rotations()[i]
            u_BTD = (h_BTD @ (weight[i] - R_RD).mT + bias[i]) @ R_RD
            return h_BTD + edited.unsqueeze(-1) * u_BTD

        return act

    for i, layer in enumerate(layers):
        plant.tap(shell, Site("resid_post", layer), install(i))
    losses = []
    optimizer = torch.optim.Adam([free, weight, bias], lr=RATE)
    for tokens, labels, starts in _batches(plant, answers):
        at_T = torch.arange(tokens.shape[1])
        edited = ((at_T >= starts[:, None] - LAST) & (at_T < starts[:, None])).float()
        losses.append(_step(shell, optimizer, tokens, labels))
    R_NRD = rotations().detach()
    return ReftPlan(
        name=name,
        model=plant.fingerprint,
        depth=plant.depth,
        width=D,
        quality=_curve(losses),
        provenance={"steps": STEPS, "rows": ROWS, "rate": RATE, "examples": len(answers)},
        layers=layers,
        form="loreft",
        is_rotation=True,
        first=0,
        last=LAST,
        rotation=R_NRD,
        weight=weight.detach().clone(),
        bias=bias.detach().clone(),
    )


Lora = dict[tuple[int, str], tuple[Tensor, Tensor]]
"""(layer, target) → A (r, in), B (out, r)."""


def train_lora(plant: Plant, answers: Sequence[Example], *, rank: int = 2) -> tuple[Lora, dict[str, object]]:
    """A LoRA adapter that makes answers like `answers` likelier, and its losses."""
    generator = torch.Generator().manual_seed(0)
    shell = plant.shell()
    found: Lora = {}
    for layer in range(plant.depth):
        for target, (read, write, place) in TARGETS.items():
            out, width = linear_weight(linears_at(plant.model, plant.layout, Site(read, layer))[place]).shape
            A = (torch.randn(rank, width, generator=generator) / width**0.5).requires_grad_()
            B = torch.zeros(out, rank, requires_grad=True)
            found[layer, target] = (A, B)
            _beside(plant, shell, Site(read, layer), Site(write, layer), A, B)
    losses = []
    optimizer = torch.optim.Adam([part for pair in found.values() for part in pair], lr=RATE)
    for tokens, labels, _ in _batches(plant, answers):
        losses.append(_step(shell, optimizer, tokens, labels))
    return {key: (A.detach(), B.detach()) for key, (A, B) in found.items()}, _curve(losses)


def _beside(plant: Plant, shell: nn.Module, read: Site, write: Site, A: Tensor, B: Tensor) -> None:
    """Add B A x to a linear map's output."""
    seen: list[Tensor] = []
    plant.tap(shell, read, seen.append)
    plant.tap(shell, write, lambda y: y + (seen.pop() @ A.mT) @ B.mT)


def _step(shell: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor, labels: Tensor) -> float:
    """One step down the cross-entropy of the labelled tokens; returns it in nats."""
    logits = shell(input_ids=tokens, use_cache=False).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def _batches(plant: Plant, answers: Sequence[Example]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """`STEPS` batches: tokens (B, T) padded on the right, labels with −100 outside the answers, where those begin."""
    rows = [encode_example(plant, f"answers[{i}]", row, "answer", 0) for i, row in enumerate(answers)]
    rng = random.Random(0)
    for _ in range(STEPS):
        part = rng.sample(rows, min(ROWS, len(rows)))
        longest = max(len(ids) for ids, _ in part)
        tokens = torch.zeros(len(part), longest, dtype=torch.int64)
        labels = torch.full_like(tokens, -100)
        for i, (ids, chosen) in enumerate(part):
            tokens[i, : len(ids)] = torch.tensor(ids)
            labels[i, list(chosen)] = tokens[i, list(chosen)]
        yield tokens, labels, torch.tensor([min(chosen) for _, chosen in part])


def _curve(losses: list[float]) -> dict[str, object]:
    """First and last losses in nats, each a mean of ten steps."""
    return {"loss_first": round(sum(losses[:10]) / 10, 4), "loss_last": round(sum(losses[-10:]) / 10, 4)}
