from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from server.account import completion_logprobs, echoed_logprobs, prompt_logprobs, spelled, text_offsets
from server.tokens import TokenTable
from steering.runtime import TokenLogprob
from tests.plants import tiny_tokenizer


def byte_level() -> PreTrainedTokenizerFast:
    """One token a byte, and one that is no sequence of bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<€>")


def spelling(names: Sequence[str] | Mapping[int, str]) -> Any:
    """A table of tokens that have these texts."""
    return SimpleNamespace(text=names.__getitem__, octets=lambda token: tuple(names[token].encode()))


def test_bytes_of_split_characters_join() -> None:
    tokenizer = byte_level()
    table, text = TokenTable(tokenizer), "a é €\n😀\x00\xad"
    tokens = tokenizer(text).input_ids
    assert len(tokens) == len(text.encode())
    assert bytes(byte for token in tokens for byte in table.octets(token) or ()) == text.encode()
    assert bytes(table.octets(tokenizer.eos_token_id) or ()) == "<€>".encode()


def test_other_vocabularies_know_the_bytes_of_whole_characters_only() -> None:
    table = TokenTable(tiny_tokenizer())
    assert table.octets(9) == tuple(table.text(9).encode())

    class Fallback:
        added_tokens_decoder: Mapping[int, str] = MappingProxyType({})

        def decode(self, tokens: list[int]) -> str:
            return "\ufffd"

    assert TokenTable(Fallback()).octets(3) is None


def test_offsets_are_where_the_tokens_begin() -> None:
    given = [TokenLogprob(index, -1.0) for index in range(3)]
    found = completion_logprobs(given, spelling(["ab", "", "cde"]), 5)
    assert found["text_offset"] == [5, 7, 7]
    assert completion_logprobs([], spelling([]))["text_offset"] == []


def test_offsets_in_a_text_count_its_characters() -> None:
    tokenizer = byte_level()
    text = "aé😀b"
    pieces = [bytes(TokenTable(tokenizer).octets(token) or ()) for token in tokenizer(text).input_ids]
    assert text_offsets(text, pieces) == [0, 1, 1, 2, 2, 2, 2, 3]
    assert text_offsets(text, [b"<bos>", *pieces, b"<eos>"]) == [0, 0, 1, 1, 2, 2, 2, 2, 3, 4]
    assert text_offsets("the cat", [b"the", b"cat"]) == [0, 3]  # a tokenizer that forgets spaces
    assert text_offsets("ab", [b"abcd", b"ef"]) == [0, 2]
    assert text_offsets("", [b"<bos>"]) == [0]


def test_of_tokens_that_read_the_same_the_likelier_is_told() -> None:
    one = TokenLogprob(7, -3.0, ((5, -1.0), (6, -2.0)), rank=3)
    table = spelling({5: "a", 6: "b", 7: "a"})
    assert completion_logprobs([one], table)["top_logprobs"] == [{"a": -1.0, "b": -2.0}]
    assert completion_logprobs([TokenLogprob(5, -float("inf"))], table)["token_logprobs"] == [-9999.0]


@pytest.mark.parametrize("cut", [3, 8], ids=["in two pieces", "whole"])
def test_offsets_of_generated_tokens_count_characters_too(cut: int) -> None:
    """As those of an echoed prompt: four tokens of one character are one character."""
    tokenizer = byte_level()
    table = TokenTable(tokenizer)
    given = [TokenLogprob(token, -1.0) for token in tokenizer("aé😀b").input_ids]
    first, second = given[:cut], given[cut:]
    found = completion_logprobs(first, table, 5)["text_offset"]
    found += completion_logprobs(second, table, 5 + spelled(first, table))["text_offset"]
    assert found == [5, 6, 6, 7, 7, 7, 7, 8]
    assert 5 + spelled(given, table) == 9


def test_the_first_token_of_a_prompt_has_no_logprob() -> None:
    table = TokenTable(tiny_tokenizer())
    given = [None, TokenLogprob(10, -3.0, ((9, -1.0), (10, -3.0)), rank=2)]
    echoed = echoed_logprobs("a cat", [9, 10], given, 1, table)
    assert echoed == {
        "tokens": ["a", "cat"],
        "token_logprobs": [None, -3.0],
        "top_logprobs": [None, {"a": -1.0, "cat": -3.0}],
        "text_offset": [0, 1],
    }
    cat = {"logprob": -3.0, "rank": 2, "decoded_token": "cat"}
    a = {"logprob": -1.0, "rank": 1, "decoded_token": "a"}
    assert prompt_logprobs(given, 2, table) == [None, {"10": cat, "9": a}]
    assert prompt_logprobs(given, 0, table) == [None, {"10": cat}]
