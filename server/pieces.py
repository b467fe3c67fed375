"""What a stream of events becomes before it is given a shape: pieces of text with what belongs to them, then ends."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from server.generation import Generation
from steering import Delta, Finished, TokenLogprob


@dataclass(frozen=True)
class Piece:
    """Text of one choice that may leave now, and the tokens it consists of.

    A token whose text is still held back (half of a character, a possible stop string) travels with the next piece.
    """

    index: int
    text: str
    deltas: tuple[Delta, ...]

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprob | None, ...] | None:
        """Those of the prompt's tokens, if they were asked for and this is the choice's first piece."""
        return self.deltas[0].prompt_logprobs


@dataclass(frozen=True)
class End:
    """The end of one choice, and the tokens that brought no text any more."""

    index: int
    finished: Finished
    deltas: tuple[Delta, ...]

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprob | None, ...] | None:
        """Those of the prompt's tokens, if they were asked for."""
        return self.finished.prompt_logprobs


async def pieces(generation: Generation) -> AsyncIterator[Piece | End]:
    """Pieces and ends of all choices as they come. The joined pieces of a choice are its whole text."""
    held: dict[int, list[Delta]] = {}
    async for index, event in generation.events():
        waiting = held.setdefault(index, [])
        if isinstance(event, Finished):
            yield End(index, event, tuple(waiting))
            continue
        waiting.append(event)
        if event.text:
            yield Piece(index, event.text, tuple(waiting))
            waiting.clear()
