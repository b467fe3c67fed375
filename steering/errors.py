"""Every error that Setpoint raises on purpose.

SteeringError
├─ SpecError        400  a field of a request or a setting is wrong; names the field; also a ValueError
├─ PlantError       400  this architecture, site or prompt is not supported by the model
├─ ControlError     400  the control problem has no usable answer
│  ├─ DimensionMismatch
│  └─ IllConditioned
├─ ArtifactError    409  an artifact cannot be used with this model
│  ├─ ArtifactCorrupt
│  ├─ StaleFingerprint
│  ├─ ArtifactNotFound   404
│  ├─ StoreUnwritable    503
│  └─ StoreUnreachable   503
├─ CapacityError    429  no room now; try again
│  ├─ BankFull
│  └─ QueueFull
├─ TeamLost         503  a process that shares the model ended
└─ Diverged         400  a request's own control made its state non-finite

A message is one sentence that says what was expected, what arrived and what to do. `param` is the dotted path of the
field, as `steering.interventions[0].setpoint`, and travels to the HTTP error unchanged.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from typing import ClassVar

_ECHO_LIMIT = 80
"""Longest piece of a caller's input that an error message repeats."""


class SteeringError(Exception):
    """Base of the tree. `status` is the HTTP status, `code` a stable word for programs."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "steering_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def at(self, prefix: str) -> SteeringError:
        """The same error with `prefix` before its field path (mutates and returns self)."""
        self.param = prefix if not self.param else f"{prefix}{'' if self.param.startswith('[') else '.'}{self.param}"
        return self


class SpecError(SteeringError, ValueError):
    """A field has an impossible value. Also a ValueError, so that validators may raise it."""

    status = 400
    code = "invalid_value"

    def __init__(self, field: str, *, expected: str, got: object = None, advice: str = "") -> None:
        arrived = "" if got is None else f", got {echo(got)}"
        tail = f"; {advice}" if advice else ""
        super().__init__(f"{field}: expected {expected}{arrived}{tail}.", param=field)


class PlantError(SteeringError):
    """The model cannot do what was asked of it."""

    status = 400
    code = "unsupported_model"


class ControlError(SteeringError):
    """The control problem is ill posed."""

    status = 400
    code = "control_error"


class DimensionMismatch(ControlError):
    """Tensors of a control problem do not fit each other."""

    code = "dimension_mismatch"


class IllConditioned(ControlError):
    """The recursion lost its accuracy."""

    code = "ill_conditioned"


class ArtifactError(SteeringError):
    """An artifact cannot be used."""

    status = 409
    code = "artifact_conflict"


class StoreUnwritable(ArtifactError):
    """The folder of the store cannot be written: its disk is full, or it is not ours."""

    status = 503
    code = "store_unwritable"


class StoreUnreachable(ArtifactError):
    """The place where a shared store is kept does not answer, and nothing of it is known here."""

    status = 503
    code = "store_unreachable"


class ArtifactCorrupt(ArtifactError):
    """A file is damaged or not an artifact of ours."""

    code = "artifact_corrupt"


class StaleFingerprint(ArtifactError):
    """An artifact was made for another model."""

    code = "artifact_model_mismatch"


class ArtifactNotFound(ArtifactError):
    """No artifact has this name."""

    status = 404
    code = "artifact_not_found"


class CapacityError(SteeringError):
    """The server is full."""

    status = 429
    code = "over_capacity"


class BankFull(CapacityError):
    """Every program slot is held by a running request."""

    code = "programs_exhausted"


class QueueFull(CapacityError):
    """The waiting queue has reached its limit."""

    code = "queue_full"


class TeamLost(SteeringError):
    """One of the processes that share a model ended, and the model with it."""

    status = 503
    code = "model_lost"


class Diverged(SteeringError):
    """A request's control drove its own state out of the range of its number format."""

    status = 400
    code = "nonfinite"


def echo(value: object) -> str:
    """A caller's value for a message, never longer than 80 characters: as JSON has it what is more than a word or a
    number, for callers write JSON, else its `repr`."""
    if is_dataclass(value) and not isinstance(value, type):
        value = {name: field for name, field in asdict(value).items() if field is not None}
    text = repr(value)
    if isinstance(value, bool | dict | list | tuple):
        with suppress(TypeError, ValueError, RecursionError):
            text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _ECHO_LIMIT else text[: _ECHO_LIMIT - 1] + "…"
