"""The short path of decode steps says bit for bit what the operator says."""

from __future__ import annotations

import math

import pytest
import torch

from kernels import feedback_, plain_feedback_
from steering.law import Law


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("same", [False, True], ids=["apart", "at its own site"])
@pytest.mark.parametrize(("tokens", "rank"), [(1, 1), (5, 1), (16, 3)])
def test_it_is_the_operator_bit_for_bit(tokens: int, rank: int, same: bool, dtype: torch.dtype) -> None:
    width, slots = 24, 4
    draw = torch.Generator().manual_seed(tokens + rank)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    probe, gain = noise(slots, rank, width), noise(slots, rank, width)
    slot = torch.randint(1, slots, (tokens,), generator=draw, dtype=torch.int32)
    y, x = noise(tokens, width).to(dtype), noise(tokens, width).to(dtype)
    setpoint, strength = noise(tokens, rank), noise(tokens, rank)
    found = []
    for plain in (False, True):
        out = y.clone()
        read = out if same else x
        measured, effort = torch.zeros(tokens, rank), torch.full((tokens,), 0.5)
        if plain:
            plain_feedback_(out, read, probe[slot.long()], gain[slot.long()], setpoint, strength, measured, effort)
        else:
            endless, none = torch.full((slots, rank), math.inf), torch.zeros(slots, rank)
            feedback_(
                out, read, slot, probe, gain, gain.norm(dim=-1), endless, -endless, -endless, none, setpoint, strength,
                torch.full((tokens, rank), math.inf), torch.full((tokens,), math.inf), torch.zeros(tokens), measured,
                effort, torch.zeros(tokens, dtype=torch.int32),
            )  # fmt: skip
        found.append((out, measured, effort))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("change", "plain"),
    [
        ({}, True),
        ({"limit": 1.0}, False),
        ({"cap": 0.5}, False),
        ({"knee": 0.0, "floor": 0.0}, False),
        ({"relative": True}, False),
        ({"strength": 0.0}, False),
    ],
)
def test_only_what_nothing_bounds_or_bends_is_plain(change: dict[str, float], plain: bool) -> None:
    v = torch.ones(3)
    assert Law.of(v, 1.0, v, **change).is_plain is plain  # type: ignore[arg-type]
    assert not (Law.of(v, 1.0, v) + Law.of(v, 1.0, torch.zeros(3))).is_plain, "a meter beside it spends nothing"
    assert (Law.of(v, 1.0, v) + Law.idle(2, 3, 3)).is_plain
