"""Text as it becomes certain: no half characters, no half stop strings.

Byte-level tokenizers spread one character over several tokens, and a decoder's output for a token depends on the one
before it. So a short window of tokens is decoded each time and only what later tokens cannot change is released.
Joined, the released pieces are the final text. Also: how a plant's tokens become text, and which of them end one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from steering.errors import PlantError
from steering.plant.plant import Plant

OPEN = "\ufffd"
"""What decoders put for bytes that are no character, yet or at all."""

WINDOW_LIMIT = 24
"""Most tokens that may wait for a character to complete: bytes that never will must not hold the text for ever."""

Decode = Callable[[list[int]], str]
"""Token ids → text, special tokens left out."""


class Detokenizer:
    """Incremental decoding of one sequence. `tail` is the end of its prompt, which some decoders need for spacing."""

    def __init__(self, decode: Decode, tail: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids = list(tail[-4:])
        self._settled = len(self._ids)
        self._sent = len(decode(self._ids)) if self._ids else 0

    def push(self, token: int) -> str:
        """The characters that `token` makes certain."""
        self._ids.append(token)
        text = self._decode(self._ids)
        is_open = text.endswith(OPEN) and len(self._ids) - self._settled <= WINDOW_LIMIT
        certain = text.rstrip(OPEN) if is_open else text
        piece = certain[self._sent :]
        self._sent = max(self._sent, len(certain))
        if not is_open:
            self._rebase()
        return piece

    def _rebase(self) -> None:
        """Let the window begin at the newest tokens, unless they alone are no context (special tokens have no text)."""
        window = self._ids[self._settled :]
        length = len(self._decode(window))
        if length or len(self._ids) > WINDOW_LIMIT:
            self._ids, self._sent = window, length
        self._settled = len(self._ids)


class StopFilter:
    """Holds back any end of the text that may be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> tuple[str, str | None]:
        """(what may leave, the stop string that was met or None). After a stop string nothing more may be pushed."""
        if not self._stops:
            return piece, None
        text = self._held + piece
        found = min(((at, s) for s in self._stops if (at := text.find(s)) >= 0), default=None)
        if found is not None:
            self._held = ""
            return text[: found[0]], found[1]
        held = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], None

    def flush(self) -> str:
        """What was held back, once no more text will come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, `stop` itself excluded."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0:
        if stop.startswith(text[at:]):
            return len(text) - at
        at = text.find(stop[0], at + 1)
    return 0


def end_tokens(plant: Plant) -> frozenset[int]:
    """The ids that end a sequence, from the generation configuration, else from the model's."""
    for config in (plant.model.generation_config, plant.model.config.get_text_config()):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return frozenset(ids if isinstance(ids, list | tuple) else [ids])
    return frozenset()


def text_decoder(plant: Plant) -> Decode:
    """Token ids → text without special tokens; empty for a plant without a tokenizer."""
    try:
        tokenizer = plant.tokenizer
    except PlantError:
        return lambda ids: ""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # a third of the time of going through transformers
        return _remembering(lambda ids: str(backend.decode(ids, skip_special_tokens=True)))
    return _remembering(
        lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    )


def _remembering(decode: Decode) -> Decode:
    """The same, with the texts of single tokens kept: every second text that a detokenizer asks for is one."""
    texts: dict[int, str] = {}

    def remembered(ids: list[int]) -> str:
        if len(ids) != 1:
            return decode(ids)
        text = texts.get(ids[0])
        if text is None:
            text = texts[ids[0]] = decode(ids)
        return text

    return remembered
