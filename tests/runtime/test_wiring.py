"""What the engine takes from a model."""

from __future__ import annotations

import gc

import pytest
from transformers import AttentionInterface

from steering.plant.plant import Plant
from steering.runtime import Engine, EngineSettings, Request
from steering.runtime.detokenize import end_tokens, text_decoder
from steering.runtime.wiring import steady_context
from tests.plants import tiny, tiny_tokenizer
from tests.runtime.naive import across_program, greedy


def test_the_attention_is_forgotten_with_its_engine() -> None:
    before = set(AttentionInterface._global_mapping)
    engine = Engine(Plant(tiny()), EngineSettings(max_batch=1))
    engine.generate([Request("a", (1, 2), greedy(2), across_program(1))])
    own = set(AttentionInterface._global_mapping) - before
    assert len(own) == 1
    del engine
    gc.collect()
    assert not own & set(AttentionInterface._global_mapping)


def test_end_tokens_come_from_the_generation_settings_first() -> None:
    plant = Plant(tiny())
    plant.model.generation_config.eos_token_id = [5, 6]
    assert end_tokens(plant) == {5, 6}
    plant.model.generation_config.eos_token_id = None
    assert end_tokens(plant) == {2}
    plant.model.config.eos_token_id = None
    assert end_tokens(plant) == frozenset()


@pytest.mark.parametrize(("kind", "length"), [("longrope", 32), ("dynamic", 32), ("default", 128), ("llama3", 128)])
def test_rotary_frequencies_that_depend_on_the_batch_limit_the_context(kind: str, length: int) -> None:
    plant = Plant(tiny("phi3"))
    plant.model.config.rope_parameters = {"rope_type": kind, "original_max_position_embeddings": 32}
    assert steady_context(plant) == length


def test_text_leaves_out_special_tokens_and_is_empty_without_a_tokenizer() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("the cat <end>").input_ids
    assert text_decoder(Plant(tiny(), tokenizer))(ids) == "the cat"
    assert text_decoder(Plant(tiny()))(ids) == ""
