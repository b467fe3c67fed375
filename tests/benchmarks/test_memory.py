"""What a token and a program cost in memory is what the shapes say."""

from __future__ import annotations

import torch

from benchmarks.memory import context_bytes, held, known_bytes, program_bytes, slot_bytes
from steering.plant.plant import Plant
from tests.plants import tiny


def test_storages_are_counted_once() -> None:
    before = held(torch.device("cpu"))
    one = torch.zeros(1000, dtype=torch.float64)
    views = [one[:10], one.view(10, 100)]
    assert held(torch.device("cpu")) - before == 8000
    del one, views
    assert held(torch.device("cpu")) == before


def test_a_position_a_slot_and_a_known_program_cost_what_their_shapes_say() -> None:
    plant = Plant(tiny("qwen2"))  # fewer heads of keys than of queries
    measured, formula = context_bytes(plant, 2)
    assert measured == formula > 0
    assert slot_bytes(plant) == program_bytes(plant) > 0
    assert known_bytes(plant) == program_bytes(plant)
