"""What the text of a completion must be: grammars over tokens, kept by llguidance.

A `GrammarCompiler` belongs to one plant, since a grammar over text becomes one over that plant's tokens. A `Grammar` is
frozen and may serve any number of requests; where one of them stands in it is its own `Matcher`. The library is
imported with the first grammar, so that a server which never sees one does not pay for it.

A mask is packed eight tokens to a byte, lowest bit first: token t is allowed if byte t // 8 has bit t % 8.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache
from typing import Any

import numpy as np

from steering.errors import PlantError, SpecError, SteeringError, echo
from steering.plant.plant import Plant
from steering.runtime.detokenize import end_tokens

MAX_SCHEMA_BYTES = 65_536
"""Longest schema, as JSON text: compiling a thousand properties (26 kB) takes 0.12 s."""
KEPT = 64
"""Compiled grammars a compiler remembers."""
MAX_LEXER_STATES = 20_000
"""States of one request's lexer, 1–2 kB each; a pattern such as `.*a.{40}` would make 2⁴⁰ of them."""
MAX_MULTIPLE = 10_000
"""Largest least common multiple of a schema's `multipleOf`, powers of ten aside: its automaton has as many states, made
all at once. 99,991 take 0.8 s and 50 MB; nothing in the library would stop 10⁸."""
WHITESPACE = r" |\n(\t{0,8}| {0,32})"
"""Between JSON's tokens: nothing, a space, or a line break with indentation. Unbounded, as JSON has it, a model that
was taught no JSON writes blanks to its last token."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """A compiled grammar; equal to another of the same source. Made by a `GrammarCompiler`."""

    source: str
    vocab: int
    """V, the number of logits it is for."""
    _start: Any = field(repr=False, compare=False)

    def matcher(self) -> Matcher:
        """The state of one request before its first token."""
        return Matcher(self._start.deep_copy(), self.vocab)


class Matcher:
    """Where one completion stands in its grammar."""

    def __init__(self, inner: Any, vocab: int) -> None:
        self._inner = inner
        self._vocab = vocab

    def mask(self) -> np.ndarray:
        """uint8 (⌈V/8⌉,), packed: the tokens that may follow, an end of sequence among them where the text may end.

        Raises SpecError if the grammar asks for more states than a request may have. Changes nothing.
        """
        packed = np.frombuffer(self._inner.compute_bitmask(), dtype=np.uint8)[: -(-self._vocab // 8)]
        if self._inner.is_error():
            raise SpecError(
                "schema",
                expected="a JSON Schema whose parts one request can keep track of",
                advice=f"simplify its patterns and objects ({_reason(self._inner.get_error())})",
            )
        if self._vocab % 8:  # a tokenizer may know more tokens than the model has logits
            packed = packed.copy()
            packed[-1] &= 2 ** (self._vocab % 8) - 1
        if not packed.any():
            raise SteeringError("No token of this model continues the text as its grammar asks.")
        return packed

    def accept(self, token: int) -> None:
        """Go on by one token. Never raises: what is wrong is told by the next `mask`."""
        self._inner.consume_token(token)

    @property
    def is_complete(self) -> bool:
        """Whether the text is whole and nothing but its end may follow."""
        return bool(self._inner.is_stopped()) and not self._inner.is_error()


class GrammarCompiler:
    """Makes grammars over a plant's tokens, from any thread. A large schema takes a tenth of a second: not for an event
    loop."""

    def __init__(self, plant: Plant) -> None:
        self._plant = plant
        self._tokens: Any = None
        self._making = threading.Lock()
        self._compile = lru_cache(maxsize=KEPT)(self._compile_source)

    def json_object(self) -> Grammar:
        """Any JSON object. Raises PlantError if the model's tokens are not known by their bytes."""
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: Mapping[str, Any]) -> Grammar:
        """JSON that fulfils `schema`, its properties in the schema's order.

        Raises SpecError for `schema` if it is no JSON, longer than `MAX_SCHEMA_BYTES`, cannot be fulfilled, or uses a
        keyword that is not enforced; PlantError if the model's tokens are not known by their bytes.
        """
        if not isinstance(schema, Mapping):
            raise SpecError("schema", expected="a JSON Schema: an object", got=schema)
        try:
            text = json.dumps(schema, allow_nan=False)
            multiple = common_multiple(json.loads(text)) if len(text) <= MAX_SCHEMA_BYTES else 1
        except (TypeError, ValueError, RecursionError) as error:
            raise _refused(str(error)) from error
        if len(text) > MAX_SCHEMA_BYTES:
            raise SpecError("schema", expected=f"at most {MAX_SCHEMA_BYTES} bytes of JSON", got=len(text))
        if multiple > MAX_MULTIPLE:
            raise SpecError("schema", expected=f"multipleOf values with a common multiple of at most {MAX_MULTIPLE}")
        return self._compile(text)

    def _compile_source(self, schema: str) -> Grammar:
        from llguidance import LLMatcher, LLParserLimits

        options = {"lenient": False, "whitespace_pattern": WHITESPACE}
        limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
        try:
            source = LLMatcher.grammar_from_json_schema(schema, overrides=options)
        except ValueError as error:
            raise _refused(str(error)) from error
        start = LLMatcher(self._tokenizer(), source, log_level=0, limits=limits)
        start.compute_bitmask()  # what cannot even begin is better told now than by the request
        if start.is_error():
            raise _refused(start.get_error())
        return Grammar(source, self._plant.vocab, start)

    def _tokenizer(self) -> Any:
        """The plant's tokens as bytes."""
        from llguidance import LLTokenizer
        from llguidance.hf import from_tokenizer

        with self._making:
            if self._tokens is None:
                tokenizer, vocab = self._plant.tokenizer, self._plant.vocab
                try:
                    # As wide as the logits: rows that were padded beyond the tokenizer belong to no token.
                    self._tokens = from_tokenizer(
                        tokenizer,
                        n_vocab=max(vocab, len(tokenizer)),
                        eos_token=sorted(end_tokens(self._plant)),
                        slices=LLTokenizer.json_slices(),
                    )
                except (ValueError, TypeError) as error:
                    raise PlantError(
                        f"The model {echo(self._plant.name)} cannot follow a grammar ({_reason(str(error))}): expected "
                        "a tokenizer that tells the bytes of its tokens, and an end-of-sequence token.",
                        param="response_format",
                    ) from error
            return self._tokens


def common_multiple(schema: Any) -> int:
    """Least common multiple of every `multipleOf` in a schema, in units of their last decimal, without powers of ten.

    More than `MAX_MULTIPLE` also for values beyond fifteen digits, as the library has them.
    """
    open_nodes, found = [schema], set[Decimal]()
    while open_nodes:
        node = open_nodes.pop()
        if isinstance(node, dict):
            value = node.get("multipleOf")
            if isinstance(value, int | float) and not isinstance(value, bool) and value:
                found.add(Decimal(str(value)).normalize())
            open_nodes.extend(node.values())
        elif isinstance(node, list):
            open_nodes.extend(node)
    if any(not -15 <= value.adjusted() <= 15 for value in found):
        return MAX_MULTIPLE + 1
    unit = min((int(value.as_tuple().exponent) for value in found), default=0)
    multiple = 1
    for value in found:
        multiple = math.lcm(multiple, int(value.scaleb(-unit)))
        if (
            multiple > MAX_MULTIPLE * 10**45
        ):  # thirty digits have at most 43 factors of five: no powers of ten explain it
            break
    while multiple % 10 == 0:
        multiple //= 10
    return multiple


def _refused(reason: str) -> SpecError:
    """The error of a schema the library does not take."""
    return SpecError("schema", expected=f"a JSON Schema that can be enforced ({_reason(reason)})")


def _reason(text: str) -> str:
    """The library's message on one line, without its advice about options that callers do not have."""
    line = " ".join(text.removesuffix("<non-verbose/>").split()).split(". Enable")[0].rstrip(".")
    return line if len(line) <= 160 else line[:159] + "…"
