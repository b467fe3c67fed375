"""Examples: what a concept is fitted from. Texts or chats, from memory or from files, checked row by row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

from steering.errors import SpecError
from steering.plant.plant import Plant

Example = str | list[dict[str, Any]]
"""A text, or a chat of messages with `role` and `content`."""

END_WEIGHT = Fraction(7, 5)
"""Weight of a sentence's end in `late` positions, in tokens. On the embedded model `polite` at λ = 2 reaches .94 at 1.7
times the perplexity with a weight of 2, .81 at 1.02 with 1, and .89 at 1.10 with this one (tuning prompts)."""
MAX_EXAMPLES = 20_000
"""Most examples of one class: beyond it a mean no longer changes and a mistake in the file is likelier."""


def read_examples(path: Path) -> list[Example]:
    """Examples of a file: one text a line, or JSONL whose objects have `text` or `messages`.

    A file is JSONL when its name ends in .jsonl or its first line is a JSON object. Empty lines are skipped. Raises
    SpecError, which names the file and the line, for a missing, unreadable or empty file and for a bad row.
    """
    try:
        # By newline alone: JSON strings may hold the other separators that `splitlines` knows. A byte-order mark goes.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(
            path.name, expected="a readable UTF-8 text file", advice="check the path and its encoding"
        ) from error
    rows = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise SpecError(path.name, expected="at least one example", advice="write one example a line")
    if path.suffix != ".jsonl" and not rows[0][1].startswith("{"):
        return [line for _, line in rows]
    return [_parsed(f"{path.name} line {number}", line) for number, line in rows]


def _parsed(where: str, line: str) -> Example:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SpecError(where, expected="a JSON object", got=line) from error
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return checked_example(where, row["text"])
    if isinstance(row, dict) and "messages" in row:
        return checked_example(where, row["messages"])
    raise SpecError(where, expected="an object with `text` or `messages`", got=row)


def checked_example(where: str, example: object) -> Example:
    """`example` if it is a non-empty text or chat. Raises SpecError that names `where`."""
    if isinstance(example, str):
        if example.strip():
            return example
        raise SpecError(where, expected="a text that is not empty", got=example)
    well_formed = (
        isinstance(example, list)
        and bool(example)
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in example
        )
    )
    if not well_formed:
        raise SpecError(where, expected="a text, or a list of messages with `role` and `content`", got=example)
    return list(cast("list[dict[str, Any]]", example))


def checked_class(name: str, examples: Sequence[Example], *, least: int = 2) -> list[Example]:
    """One class of examples. Raises SpecError when it is too small or too large, or names the bad row."""
    if isinstance(examples, str) or not least <= len(examples) <= MAX_EXAMPLES:
        got = 1 if isinstance(examples, str) else len(examples)
        raise SpecError(
            name,
            expected=f"{least} to {MAX_EXAMPLES} examples",
            got=got,
            advice="a concept needs positive and negative examples, 50 or more of each are usual",
        )
    return [checked_example(f"{name}[{row}]", example) for row, example in enumerate(examples)]


def checked_classes(positive: Sequence[Example], negative: Sequence[Example]) -> dict[str, list[Example]]:
    """Both classes of a fit by their names. Raises SpecError as `checked_class` does."""
    return {"positive": checked_class("positive", positive), "negative": checked_class("negative", negative)}


def encode_example(
    plant: Plant, where: str, example: Example, positions: str, skip: int
) -> tuple[list[int], Sequence[int]]:
    """Token ids of an example, and the positions that a fit reads, ascending.

    positions: `last` the last token · `all` every token from `skip` on · `answer` the tokens of a chat's last message,
    which has to be the assistant's · `late` the second half of those, a sentence's end weighing `END_WEIGHT` times as
    much: there the next sentence is decided · `auto` `answer` for a chat that ends with the assistant, `last` for
    another chat, `all` for a text. An example longer than the model's context keeps its end.
    Raises SpecError that names `where`.
    """
    ids = plant.encode(example)
    dropped = max(0, len(ids) - plant.context)
    ends_with_answer = not isinstance(example, str) and example[-1]["role"] == "assistant"
    if positions == "auto":
        positions = "all" if isinstance(example, str) else "answer" if ends_with_answer else "last"
    if positions == "last":
        start = len(ids) - 1
    elif positions == "all":
        start = min(skip, len(ids) - 1)
    elif ends_with_answer:
        start = min(len(plant.encode(example[:-1])) if len(example) > 1 else 1, len(ids) - 1)
    else:
        raise SpecError(
            where, expected=f"a chat that ends with the assistant, for positions {positions!r}", got=example
        )
    if positions == "late":
        start += (len(ids) - start) // 2
    chosen = range(max(start - dropped, 0), len(ids) - dropped)
    if positions == "late":
        ends = [
            i for i in chosen[:-1] if str(plant.tokenizer.decode([ids[dropped + i]])).strip().endswith((".", "!", "?"))
        ]
        times = END_WEIGHT.as_integer_ratio()
        return ids[dropped:], sorted([*chosen] * times[1] + [*ends] * (times[0] - times[1]))
    return ids[dropped:], chosen
