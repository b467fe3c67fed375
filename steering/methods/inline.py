"""Tensors that travel inside a request, as base64 of their bytes, little-endian, row-major."""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from steering.errors import SpecError

MAX_ELEMENTS = 2**22
"""Most numbers of one tensor."""
_LAYER = re.compile(r"layer\.(0|[1-9][0-9]{0,3})")
_WIDTH = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
DType = Literal["float64", "float32", "float16", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class InlineTensor:
    """One tensor: number format, shape, and the base64 of its bytes. Raises SpecError where the three disagree."""

    __pydantic_config__: ClassVar[Mapping[str, object]] = {"extra": "forbid", "use_attribute_docstrings": True}

    dtype: DType
    """float64, float32, float16 or bfloat16."""
    shape: tuple[int, ...]
    """Row-major."""
    data: str
    """base64 of the little-endian bytes."""

    def __post_init__(self) -> None:
        if self.dtype not in _WIDTH:
            raise SpecError("dtype", expected=f"one of {', '.join(_WIDTH)}", got=self.dtype)
        if not 1 <= len(self.shape) <= 4 or min(self.shape) < 1 or math.prod(self.shape) > MAX_ELEMENTS:
            raise SpecError(
                "shape", expected=f"1 to 4 sizes >= 1, of at most {MAX_ELEMENTS} numbers", got=list(self.shape)
            )

    def tensor(self) -> Tensor:
        """The numbers in float32. Raises SpecError for data that are no base64, of another length, or not finite."""
        try:
            raw = base64.b64decode(self.data, validate=True)
        except (binascii.Error, ValueError) as error:
            raise SpecError("data", expected="base64", got=self.data[:40]) from error
        wanted = math.prod(self.shape) * _WIDTH[self.dtype]
        if len(raw) != wanted:
            raise SpecError(
                "data", expected=f"{wanted} bytes for shape {list(self.shape)} of {self.dtype}", got=len(raw)
            )
        if self.dtype == "bfloat16":
            numbers = torch.from_numpy(np.frombuffer(raw, dtype="<i2").copy()).view(torch.bfloat16).float()
        else:
            kind = {"float64": "<f8", "float32": "<f4", "float16": "<f2"}[self.dtype]
            with np.errstate(over="ignore"):
                numbers = torch.from_numpy(np.frombuffer(raw, dtype=kind).astype(np.float32))
        if not torch.isfinite(numbers).all():
            raise SpecError("data", expected="numbers that are finite in float32")
        return numbers.reshape(self.shape)


def encoded(tensor: Tensor) -> dict[str, object]:
    """A tensor as a request or an answer carries it, in float32."""
    numbers = tensor.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4")
    return {"dtype": "float32", "shape": list(tensor.shape), "data": base64.b64encode(numbers.tobytes()).decode()}


def by_layer(path: str, given: Mapping[str, InlineTensor], depth: int, width: int) -> dict[int, Tensor]:
    """Vectors (D,) by block, from `layer.N` → tensor. Raises SpecError that names the entry below `path`."""
    if not given:
        raise SpecError(path, expected="at least one vector", advice='as {"layer.4": {"dtype", "shape", "data"}}')
    found = {}
    for name, one in given.items():
        match = _LAYER.fullmatch(name)
        if not match or int(match[1]) >= depth:
            raise SpecError(f"{path}.{name[:64]}", expected=f"layer.0 to layer.{depth - 1}", got=name)
        if one.shape != (width,):
            raise SpecError(f"{path}.{name}.shape", expected=f"[{width}], the model's width", got=list(one.shape))
        try:
            found[int(match[1])] = one.tensor()
        except SpecError as error:
            raise error.at(f"{path}.{name}") from error
    return found
