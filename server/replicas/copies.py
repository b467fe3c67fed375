"""What the gateway knows of the processes behind it: some that answer, and one that writes and runs the jobs.

The gateway speaks ASGI with them: a scope and a whole body go there, batches of messages come back. After the last
message stands one of type END, with what a log line says of the call. `Copies` is all that the gateway uses of them, so
that it can be tested without any.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.types import Message

END = "setpoint.end"
"""Type of the message after the last: `notes`, `error` and `place` of the call, the `job` that it queued, and whether
it is `whole`."""


class Lost(Exception):
    """The process that worked on a call is gone."""


class Nobody(Exception):
    """There is no process that could take a call."""


class Busy(Exception):
    """All processes have as many calls as they may have, and so many wait already."""


class Copies(Protocol):
    """Processes with the same model, any of which takes a call."""

    def call(self, scope: dict[str, Any], body: bytes) -> AsyncGenerator[list[Message], None]:
        """One call on one of them. Raises Lost, Nobody, Busy. Closing the iterator cancels the call."""

    def stream(self, method: str) -> AsyncGenerator[Any, None]:
        """What a method of one of them yields. Raises Lost, Nobody."""

    async def each(self, method: str, *arguments: object, seconds: float = 5.0) -> list[Any]:
        """What a method gives on every one of them that answers in time. Raises TimeoutError if one is silent."""


@dataclass(eq=False)
class Generation:
    """Processes that were started together, which a rolling restart replaces together."""

    number: int
    serving: Copies
    writing: Copies
    running: int = 0
    """Calls of the gateway that are in progress on them."""


class Fleet(Protocol):
    """Starts and ends processes. Every method but `give_up` blocks, and is called on one thread."""

    def start(self) -> None:
        """Make ready what starts processes. Raises SteeringError."""

    def deploy(self) -> Generation:
        """Start a generation, and wait until all of it answers. Raises SteeringError."""

    def give_up(self) -> None:
        """Let a start and a deploy that are under way fail soon, and those that come. From any thread."""

    def delete(self, generation: Generation) -> None:
        """End a generation, at once."""

    def stop(self) -> None:
        """End everything."""
