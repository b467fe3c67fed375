"""What a decode step must read follows from the shapes, and a way that is not to be had is a row that says why."""

from __future__ import annotations

import pytest

from benchmarks import decode
from steering.plant.plant import Plant
from tests.plants import tiny


def test_a_step_reads_all_weights_but_the_embedding_and_the_batch_s_context() -> None:
    plant = Plant(tiny("llama"))
    model, config = plant.model, plant.model.config
    numbers = sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name)
    if config.tie_word_embeddings:
        numbers += model.get_output_embeddings().weight.numel()
    position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert decode.traffic(plant, 3, 10.0) == 4 * (numbers + 3 * 10 * position)


def test_rows_of_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = {"plain": {"graphs": False, "pipeline": False}, "elsewhere": {"kv_tokens": -1}}
    monkeypatch.setattr(decode, "WAYS", ways)
    plain, elsewhere = decode.measure(Plant(tiny("llama")), 2, 1, 2, 2, 1e9)
    assert "kv_tokens" in elsewhere["absent"]
    assert plain["unsteered_roofline"] > 0
    assert plain["unsteered_roofline"] * plain["unsteered_ms"] == pytest.approx(
        plain["steered_roofline"] * plain["steered_ms"]
    )
    assert plain["ratio"] > 0
