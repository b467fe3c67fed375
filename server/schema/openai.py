"""Requests in OpenAI's shape, with vLLM's sampling fields and the `steering` object.

Types only: whatever needs the model (lengths, token ids, concepts) is checked in `server.translate`. Unknown fields are
tolerated, as OpenAI does; fields that are known, not supported where they stand and would change the answer are refused
(`UNSUPPORTED`).
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import SequenceMatcher
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from server.schema.steering import SteeringSpec, Target

_INT64 = 2**63 - 1
"""JSON's integers have no end: a number of a thousand digits is refused before a message could repeat it."""
_NOTHING: tuple[object, ...] = (None, False, [], {}, "")

UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "add_generation_prompt": (None, True),
    "add_special_tokens": (None, True),
    "allowed_token_ids": _NOTHING,
    "audio": _NOTHING,
    "bad_words": _NOTHING,
    "best_of": (None,),
    "chat_template": _NOTHING,
    "chat_template_kwargs": _NOTHING,
    "continue_final_message": _NOTHING,
    "documents": _NOTHING,
    "echo": _NOTHING,
    "function_call": (None, "none", "auto"),
    "functions": _NOTHING,
    "guided_choice": _NOTHING,
    "guided_grammar": _NOTHING,
    "guided_json": (None,),
    "guided_regex": _NOTHING,
    "include_stop_str_in_output": _NOTHING,
    "length_penalty": (None, 1, 1.0),
    "logits_processors": _NOTHING,
    "modalities": (None, [], ["text"]),
    "prompt_embeds": _NOTHING,
    "skip_special_tokens": (None, True),
    "structured_outputs": _NOTHING,
    "suffix": (None,),
    "tool_choice": (None, "none", "auto"),
    "tools": (None,),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": _NOTHING,
    "web_search_options": (None,),
}
"""Fields that would change the answer, each with the values that ask for nothing. Refused with any other value wherever
the body's model does not have them: `echo` is a field of text completions alone."""

STEERING_KEYS = ("targets", "interventions", "preset", "default", "guard", "trace")
"""Keys of `steering` that are refused beside it: tolerated as unknown fields, they would do nothing without a word."""


class StreamOptions(BaseModel):
    """What a stream carries besides text."""

    include_usage: bool | None = None


class JsonSchemaFormat(BaseModel):
    """The schema that an answer must follow. It is always followed, whatever `strict` says."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    name: str
    """1 to 64 letters, digits, underscores or hyphens."""
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    """A JSON schema."""
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """What the answer's text must be: anything, any JSON object, or JSON that follows a schema."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
    """With `json_schema` only."""


class _Generation(BaseModel):
    """The fields that every way of generating shares. null is the same as absent."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    model: str | None = None
    """The served model's id; absent means that one."""
    max_tokens: Annotated[int, Field(ge=0, le=_INT64)] | None = None
    """0 reads the prompt only: for `echo` and `prompt_logprobs`."""
    max_completion_tokens: Annotated[int, Field(ge=0, le=_INT64)] | None = None
    """As `max_tokens`, which it overrides."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """0 and -1 keep the whole vocabulary."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-_INT64 - 1, le=_INT64)] | None = None
    """int64. With `n` > 1 choice i is drawn from seed + i."""
    stop: str | Annotated[list[str], Field(max_length=4, fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=256, fail_fast=True)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    logit_bias: dict[str, float] | None = None
    """Token id, as a string → a bias from -100 to 100."""
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Log-probabilities of the prompt's tokens and of so many alternatives, in vLLM's shape. Not with `stream`."""
    return_token_ids: bool | None = None
    """Token ids beside the text: `prompt_token_ids` and each choice's `token_ids`."""
    response_format: ResponseFormat | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """Prompts are shared in the prefix cache only among requests of one salt: nobody else can tell by the time an
    answer takes what was asked before."""
    steering: SteeringSpec | None = None


class _Turn(BaseModel):
    """How the end of `messages` is left: for a new answer (the default), closed, or open to be continued."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    add_generation_prompt: bool | None = None
    """For messages: false leaves out the beginning of the model's answer."""
    continue_final_message: bool | None = None
    """For messages: leave the last one, the assistant's, open, so that the model goes on with it."""


class TextPart(BaseModel):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a chat. Content is text, or parts of text.

    Parts are joined by newlines, as vLLM joins them for templates that take plain text (OpenAI's API does not say how).
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]

    def plain(self) -> dict[str, str]:
        """Role and text, as a chat template takes them."""
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True)]
TokenIds = Annotated[list[int], Field(min_length=1, fail_fast=True)]


def _kind_of_prompt(value: object) -> str:
    """The branch of `Prompt` that the first element chooses, so that a long list is tried as one thing only."""
    if not isinstance(value, list):
        return "text"
    first = value[0] if value else None
    return "texts" if isinstance(first, str) else "lists" if isinstance(first, list) else "ids"


Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[TokenIds, Tag("ids")]
    | Annotated[list[str], Field(min_length=1, fail_fast=True), Tag("texts")]
    | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True), Tag("lists")],
    Discriminator(_kind_of_prompt),
]
"""One text, one list of token ids, or several of either."""


class ChatRequest(_Generation, _Turn):
    """`POST /v1/chat/completions`."""

    messages: Messages
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class CompletionRequest(_Generation):
    """`POST /v1/completions`. `max_tokens` is 16 when absent."""

    prompt: Prompt
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    """The prompt before the completion; with `logprobs` its tokens too, the first without a log-probability."""


class GenerateRequest(_Generation, _Turn):
    """`POST /v1/generate`: one continuation, and with `compare` that of the unsteered twin."""

    prompt: str | TokenIds | None = None
    messages: Messages | None = None
    """Either `prompt` or `messages`."""
    targets: Annotated[dict[str, Target], Field(max_length=16)] | None = None
    """Short for `steering.targets`."""
    compare: bool | None = None
    """Run the unsteered twin in the same batch, from the same seed."""
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class TokenizeRequest(_Turn):
    """`POST /tokenize`, in vLLM's shape."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    """Either `prompt` or `messages`."""
    add_special_tokens: bool = True
    """For a prompt: whether to add the model's beginning-of-text token."""
    return_token_strs: bool | None = None


class DetokenizeRequest(BaseModel):
    """`POST /detokenize`, in vLLM's shape."""

    model: str | None = None
    tokens: Annotated[list[int], Field(fail_fast=True)]


class TraceRequest(BaseModel):
    """`POST /v1/steering/trace`: projections of a prompt on concepts, without generation. Strict, as `steering` is."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    prompt: str | TokenIds | None = None
    messages: Messages | None = None
    concepts: Annotated[list[str], Field(min_length=1, max_length=32, fail_fast=True)]
    units: Literal["centred", "contrast", "absolute"] = "centred"


ALMOST = 0.87
"""Likeness from which on a key is taken for `steering`: stering, steeering, stearing; not string (0.86), streaming."""


def unsupported_field(data: Mapping[str, Any], model: type[BaseModel]) -> str | None:
    """The first field of `data` that asks for something which requests of this `model` cannot have."""
    for name, harmless in UNSUPPORTED.items():
        if name not in data or name in model.model_fields:
            continue
        if not any(type(data[name]) is type(value) and data[name] == value for value in harmless):
            return name
    return None


def is_almost_steering(name: str) -> bool:
    """Whether a key is `steering`, or so near to it that nothing else can be meant."""
    plain = name.lower().replace("_", "").replace("-", "")
    return plain in ("steer", "steers", "steered") or SequenceMatcher(None, plain, "steering").ratio() >= ALMOST


def misplaced_field(data: Mapping[str, Any], model: type[BaseModel]) -> str | None:
    """The first key of `steering` that stands beside it in `data`, unless it is a field of `model`; and `steering`
    itself where it is misspelt, or left in `extra_body`, which only OpenAI's client unpacks."""
    for name, value in data.items():
        if name in model.model_fields or value is None:
            continue
        if name in STEERING_KEYS or is_almost_steering(name):
            return name
        if name == "extra_body" and isinstance(value, dict):
            for inner in value:
                if inner in STEERING_KEYS or is_almost_steering(str(inner)):
                    return f"extra_body.{inner}"
    return None
