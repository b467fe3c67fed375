"""Text and bytes of single tokens, for log-probabilities and traces.

A token may hold a part of a character only. Its text is then U+FFFD, but a byte-level vocabulary knows its bytes: each
is written as one printable character, after GPT-2's table (Radford et al. 2019): bytes that print stand for themselves,
the others, in order, for the code points from 256 on. Joined bytes of consecutive tokens are the bytes of their text.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

_CACHED = 2**16


def _byte_table() -> dict[str, int]:
    """Character → byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    hidden = [byte for byte in range(256) if chr(byte) not in table]
    return table | {chr(256 + index): byte for index, byte in enumerate(hidden)}


_BYTES = _byte_table()


class TokenTable:
    """Single tokens of a tokenizer; what was asked for once is remembered."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        self._is_byte_level = decoder is not None and b'"ByteLevel"' in decoder.__getstate__()
        self._added = frozenset(tokenizer.added_tokens_decoder)
        self.text = lru_cache(_CACHED)(self._text)
        self.octets = lru_cache(_CACHED)(self._octets)

    def _text(self, token: int) -> str:
        text: str = self._tokenizer.decode([token])
        return text

    def _octets(self, token: int) -> tuple[int, ...] | None:
        """The token's own bytes; None where they are not known: half a character of a vocabulary of another kind."""
        piece = self._tokenizer.convert_ids_to_tokens(token) if self._is_byte_level else None
        if piece is not None and token not in self._added and all(char in _BYTES for char in piece):
            return tuple(_BYTES[char] for char in piece)
        text = self.text(token)
        return None if "\ufffd" in text else tuple(text.encode())
