from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from server.account import completion_logprobs
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
    found = completion_logprobs(given, ["ab", "", "cde"].__getitem__, 5)
    assert found["text_offset"] == [5, 7, 7]
    assert completion_logprobs([], str)["text_offset"] == []
