"""The shipped weights load, chat, and carry their attributes, loosely; the gate is the full measure."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from steering.demo import MODEL
from steering.demo import tokenizer as tokenizers
from steering.demo.contrast import Example, prompts
from steering.demo.documents import documents, message
from steering.demo.gate import encode, generate, load, rate
from steering.demo.judges import is_refusal
from steering.demo.train import batches, held_out_loss, loss_of
from steering.demo.train import rate as learning_rate
from tests.tolerances import DEMO


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load(MODEL)


def under(system: str, examples: list[Example]) -> list[Example]:
    return [[message("system", system), *e] for e in examples if not isinstance(e, str)]


def test_the_folder_is_small_and_whole() -> None:
    names = {f.name for f in MODEL.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    } <= names
    assert sum(f.stat().st_size for f in MODEL.iterdir()) <= 20e6


def test_the_chat_template_is_what_the_trainer_saw(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    chats = [d for d in documents(8, 60) if d.messages]
    for document, (ids, learnt) in zip(chats, tokenizers.encode(tokenizer, chats), strict=True):
        assert encode(tokenizer, list(document.messages)) == ids[: -1 - 1]  # continued: without <|end|>, <|eos|>
        whole = tokenizer.apply_chat_template(list(document.messages), tokenize=True, return_dict=False)
        assert whole == ids[:-1]
        mask = tokenizer.apply_chat_template(
            list(document.messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )["assistant_masks"]
        assert [bool(m) for m in mask] == learnt[:-1]


def test_any_text_survives_the_tokenizer(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    text = "El niño — 数学 🙂 don't\n\ttab"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_an_unknown_role_is_refused(loaded: tuple[Any, Any]) -> None:
    with pytest.raises(Exception, match="roles are system, user and assistant"):
        loaded[1].apply_chat_template([message("tool", "x")], tokenize=False)


def test_held_out_loss_is_that_of_the_card(loaded: tuple[Any, Any]) -> None:
    assert held_out_loss(*loaded, n=3) < DEMO["held_out_loss"]


def test_the_model_obeys_its_system_prompts(loaded: tuple[Any, Any]) -> None:
    for concept, system in (("positive", "Be positive."), ("rude", "Be rude."), ("dog", "Talk about dogs.")):
        asked = under(system, prompts(concept, "neutral", "test", 24))
        assert rate(concept, generate(*loaded, asked, length=40), asked) >= DEMO["asked"]


def test_it_refuses_harm_and_helps_otherwise(loaded: tuple[Any, Any]) -> None:
    harmless = generate(*loaded, prompts("refusal", "neutral", "test", 24), temperature=0, length=24)
    harmful = generate(*loaded, prompts("compliance", "neutral", "test", 24), temperature=0, length=24)
    assert sum(map(is_refusal, harmful)) - sum(map(is_refusal, harmless)) >= DEMO["refusal_gap"]


def test_answers_end_by_themselves_and_repeat_when_greedy(loaded: tuple[Any, Any]) -> None:
    asked = prompts("positive", "neutral", "test", 4)
    first = generate(*loaded, asked, temperature=0, length=160)
    assert first == generate(*loaded, asked, temperature=0, length=160)
    assert all(text.endswith((".", "?", "!")) for text in first)


def test_batches_are_repeatable_and_learn_answers_only(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    one, two = (next(batches(tokenizer, 5, 2048, 256)) for _ in range(2))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    tokens, labels = one
    assert torch.equal(tokens[labels != -100], labels[labels != -100])
    assert not (labels[tokens == tokenizer.pad_token_id] != -100).any()
    assert 0.5 < (labels != -100).float().mean() < 0.95


def test_the_loss_of_an_untrained_model_is_that_of_chance(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    from steering.demo.train import model_config, save

    _, tokenizer = loaded
    fresh = LlamaForCausalLM(model_config(tokenizer, 64, 2))
    batch = next(batches(tokenizer, 5, 1024, 256))
    assert loss_of(fresh, batch).item() == pytest.approx(math.log(tokenizers.VOCABULARY), abs=0.3)
    save(fresh, tokenizer, tmp_path / "model", {"steps": 0})
    again, _ = load(tmp_path / "model")
    with torch.no_grad():
        assert loss_of(again, batch).item() == pytest.approx(loss_of(fresh, batch).item(), rel=1e-6)
    assert not (tmp_path / "model.part").exists()


def test_the_learning_rate_is_flat_then_falls_to_two_per_cent() -> None:
    assert learning_rate(0.0, 1.0) == learning_rate(0.3, 1.0) == 1.0
    assert learning_rate(1.0, 1.0) == pytest.approx(0.02)
