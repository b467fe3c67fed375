"""The released pieces join to the text, and nothing leaves that a later token could change."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from steering.runtime.detokenize import Detokenizer, StopFilter, _remembering
from tests.plants import tiny_tokenizer


def byte_level() -> Tokenizer:
    """One token per byte, by number."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


BYTES = byte_level()


def fallback() -> Tokenizer:
    """SentencePiece's way: words with ▁, and <0x..> for bytes."""
    words = ["<unk>", "▁the", "▁dog", "s", *(f"<0x{b:02X}>" for b in range(256))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@settings(max_examples=40, deadline=None)
@given(st.text(min_size=1, max_size=40), st.text(max_size=5))
def test_bytes_join_to_characters_and_no_half_one_leaves(text: str, before: str) -> None:
    text = text.replace("\ufffd", "")
    detokenizer = Detokenizer(BYTES.decode, BYTES.encode(before).ids)
    pieces = [detokenizer.push(token) for token in BYTES.encode(text).ids]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_half_character_at_the_end_is_dropped() -> None:
    ids = BYTES.encode("né").ids
    detokenizer = Detokenizer(BYTES.decode)
    assert [detokenizer.push(token) for token in ids[:-1]] == ["n", ""]


def test_bytes_that_are_no_text_do_not_hold_it_for_ever() -> None:
    lone = BYTES.token_to_id(BYTES.id_to_token(BYTES.encode("é").ids[0]))
    detokenizer = Detokenizer(BYTES.decode)
    pieces = [detokenizer.push(lone) for _ in range(100)] + [detokenizer.push(t) for t in BYTES.encode("ok").ids]
    assert "".join(pieces).endswith("ok")
    assert sum(bool(piece) for piece in pieces) >= 5


def test_words_keep_their_spaces_after_bytes_and_prompts() -> None:
    tokenizer = fallback()
    ids = [1, 2, 3, *(tokenizer.token_to_id(f"<0x{b:02X}>") for b in "é€".encode()), 2, 1]
    detokenizer = Detokenizer(tokenizer.decode)
    assert "".join(detokenizer.push(t) for t in ids) == tokenizer.decode(ids) == "the dogsé€ dog the"
    after = Detokenizer(tokenizer.decode, [1])
    assert "".join(after.push(t) for t in ids[1:3]) == " dogs"


def test_special_tokens_have_no_text_and_take_no_space() -> None:
    tokenizer = tiny_tokenizer()
    decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)  # noqa: E731
    ids = tokenizer("the cat <end> sat", add_special_tokens=False).input_ids
    detokenizer = Detokenizer(decode, tokenizer("<user> <assistant>").input_ids)
    assert "".join(detokenizer.push(t) for t in ids) == decode(ids)


@pytest.mark.parametrize("stops", [("ab",), ("abc", "bcx"), ("aab",), ("b", "abab")])
@settings(max_examples=40, deadline=None)
@given(text=st.text("abcx", max_size=30), cuts=st.lists(st.integers(0, 30), max_size=10))
def test_a_stop_string_and_its_beginnings_are_held_back(stops: tuple[str, ...], text: str, cuts: list[int]) -> None:
    at = sorted({0, *(min(c, len(text)) for c in cuts), len(text)})
    filter_, released, met = StopFilter(stops), "", None
    for a, b in pairwise(at):
        piece, met = filter_.push(text[a:b])
        released += piece
        if met is not None:
            break
        assert not any(stop in released for stop in stops)
        begun = [k for stop in stops for k in range(1, len(stop)) if text[:b].endswith(stop[:k])]
        assert len(released) == b - max(begun, default=0)
    first = min((text.find(s) for s in stops if s in text), default=-1)
    if met is None:
        assert first == -1
        assert released + filter_.flush() == text
    else:
        assert released == text[: text.find(met)]
        assert met in stops


def test_a_single_tokens_text_is_worked_out_once() -> None:
    asked: list[list[int]] = []

    def decode(ids: list[int]) -> str:
        asked.append(ids)
        return "".join(chr(97 + token) for token in ids)

    remembered = _remembering(decode)
    assert [remembered(ids) for ids in ([1], [1, 2], [1], [1, 2], [2])] == ["b", "bc", "b", "bc", "c"]
    assert asked == [[1], [1, 2], [1, 2], [2]]
