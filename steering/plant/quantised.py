"""Quantised models as plants: how they are loaded, and their linear maps as numbers where derivatives are taken.

    W x ≈ what the module computes,   Wᵀ = f(I)        f the module's own forward pass without its bias, I in pieces

A quantised linear map is a linear map: what it does to the unit vectors is its weight, whatever the library, packing
and kernel behind it, and also where the kernel has no derivative (bitsandbytes NF4 and int8 activations on a CPU have
none). A unit vector is exact in every format, so for quantised weights this is their exact value in the module's
own number format; where activations are rounded too, the derivative is that of the map without their rounding.

Costs a forward pass of as many rows as the map has inputs, once for each block that is linearised; one block's weights
in float32 are held at a time.   Oracle: the library's own dequantisation.

    name                  package        weights                          activations
    int8                  torchao        int8, a scale per output         as the model's
    int8-dynamic          torchao        int8, a scale per output         int8, a scale per token
    fp8                   torchao        float8 e4m3, a scale per output  as the model's
    nf4                   bitsandbytes   4 bits (NF4), blocks of 64       as the model's
    int8-outliers         bitsandbytes   int8 (LLM.int8)                  int8, outliers in 16 bits

Sources: torchao · LLM.int8, arXiv:2208.07339 · QLoRA (NF4), arXiv:2305.14314.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel, TorchAoConfig

from steering.errors import PlantError, echo

NONE = "none"
"""The quantisation of a model that is served as its checkpoint stores it."""
PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Number formats of weights that are not quantised."""
ROWS = 512
"""Unit vectors given to a linear map at a time."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """One way to quantise the linear maps of a model while it is loaded."""

    package: str
    """What has to be installed beside accelerate."""
    config: Callable[[torch.dtype], Any]
    """Makes transformers' quantisation configuration for activations in that format, where the package is there."""


def _torchao(name: str) -> Callable[[torch.dtype], Any]:
    def make(_: torch.dtype) -> Any:
        from torchao import quantization

        return TorchAoConfig(getattr(quantization, name)())

    return make


SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {
        "int8": Scheme("torchao", _torchao("Int8WeightOnlyConfig")),
        "int8-dynamic": Scheme("torchao", _torchao("Int8DynamicActivationInt8WeightConfig")),
        "fp8": Scheme("torchao", _torchao("Float8WeightOnlyConfig")),
        "nf4": Scheme(
            "bitsandbytes",
            lambda served: BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=served
            ),
        ),
        "int8-outliers": Scheme("bitsandbytes", lambda _: BitsAndBytesConfig(load_in_8bit=True)),
    }
)
"""The quantisations that `Plant.load` offers, by name."""
PACKAGES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "torchao": ("torchao",),
        "bitsandbytes": ("bitsandbytes",),
        "awq": ("gptqmodel",),
        "gptq": ("gptqmodel", "optimum"),
        "compressed-tensors": ("compressed_tensors",),
        "hqq": ("hqq",),
        "quanto": ("optimum.quanto",),
        "aqlm": ("aqlm",),
        "auto-round": ("auto_round",),
    }
)
"""What a checkpoint that is stored quantised needs beside accelerate, by the `quant_method` of its config.json."""


def stored_method(config: PreTrainedConfig) -> str | None:
    """How a checkpoint's weights are quantised as they are stored; None where they are not."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    found = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    return str(getattr(found, "value", found))


def chosen(name: str, quantization: str, dtype: str, config: PreTrainedConfig) -> tuple[str, Any]:
    """How `name` is to be loaded: the quantisation's name (`none` without), and transformers' configuration of it, if
    the checkpoint does not bring its own.

    Raises PlantError for an unknown quantisation, one on top of the checkpoint's own, or a package that is not here.
    """
    if quantization != NONE and quantization not in SCHEMES:
        raise PlantError(
            f"quantization: expected one of {', '.join((NONE, *SCHEMES))}, got {echo(quantization)}.",
            param="quantization",
        )
    method = stored_method(config)
    if method is not None:
        if quantization != NONE:
            raise PlantError(
                f"The checkpoint {echo(name)} is stored quantised already ({method}): leave out quantization.",
                param="quantization",
            )
        _need(name, method, PACKAGES.get(method, ()))
        return method, None
    if quantization == NONE:
        return NONE, None
    scheme = SCHEMES[quantization]
    _need(name, quantization, (scheme.package,))
    stored = getattr(config, "dtype", None) if dtype == "auto" else getattr(torch, dtype)
    return quantization, scheme.config(stored if isinstance(stored, torch.dtype) else torch.float32)


def is_quantised(linear: nn.Module) -> bool:
    """Whether a linear map keeps its weight otherwise than as a plain matrix of floating-point numbers."""
    weight = getattr(linear, "weight", None)
    if not isinstance(weight, Tensor) or type(weight) not in (Tensor, nn.Parameter):
        return True
    return weight.dtype not in PLAIN or weight.dim() != 2


def quantised_maps(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The quantised linear maps inside `module`, by path."""
    for path, part in module.named_modules():
        if hasattr(part, "in_features") and hasattr(part, "out_features") and is_quantised(part):
            yield path, part


def as_numbers(linear: nn.Module, served: torch.dtype, dtype: torch.dtype) -> Tensor:
    """W (out, in) of a quantised linear map in `dtype`, from what it does to the unit vectors of the format `served`.

    Raises PlantError if the map cannot be run where it is.
    """
    width, out, device = int(linear.in_features), int(linear.out_features), _device(linear)  # type: ignore[arg-type]
    W_OI = torch.empty(out, width, dtype=dtype, device=device)
    linear = _without_bias(linear)
    try:
        with torch.no_grad():
            for start in range(0, width, ROWS):
                unit_RI = torch.zeros(min(ROWS, width - start), width, dtype=served, device=device)
                unit_RI.diagonal(start).fill_(1)
                W_OI[:, start : start + len(unit_RI)] = linear(unit_RI).to(dtype).T
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0][:160]
        raise PlantError(
            f"A quantised {type(linear).__name__} cannot be read as numbers on {device} ({reason}): fit on the model "
            "as its checkpoint stores it, or with another quantization.",
            param="quantization",
        ) from error
    return W_OI


def _without_bias(linear: nn.Module) -> nn.Module:
    """The map over the same weights with no bias: W + b, rounded to 16 bits, would not tell W where b is large."""
    bare = copy.copy(linear)
    for store in ("_parameters", "_buffers"):
        bare.__dict__[store] = dict(linear.__dict__[store])  # the copy's own, or the original would lose its bias
    if getattr(linear, "bias", None) is not None:
        bare.bias = None  # type: ignore[assignment]
    return bare


def unquantise(block: nn.Module, served: torch.dtype, dtype: torch.dtype) -> Callable[[], dict[str, Tensor]]:
    """Open `block` to derivatives; returns what gives its weights in `dtype`, for `torch.func.functional_call`.

    Its quantised linear maps are replaced by plain ones without memory, whose weights are computed at each call.
    `block` must belong to nobody else.
    Raises PlantError if a part of it is quantised that is no linear map.
    """
    maps = dict(quantised_maps(block))
    for path, part in maps.items():
        bias = getattr(part, "bias", None) is not None
        plain = nn.Linear(part.in_features, part.out_features, bias, device="meta")  # type: ignore[arg-type]
        block.set_submodule(path, plain.requires_grad_(False))
    for name, p in block.named_parameters():
        if p.dtype not in PLAIN:
            raise PlantError(
                f"The weights {name} are quantised and belong to no linear map, so the block has no derivatives here: "
                "fit on the model as its checkpoint stores it, or with another quantization.",
                param="quantization",
            )

    def weights() -> dict[str, Tensor]:
        found = {name: p.to(dtype) for name, p in block.named_parameters() if p.device.type != "meta"}
        for path, part in maps.items():
            found[f"{path}.weight"] = as_numbers(part, served, dtype)
            if (bias := getattr(part, "bias", None)) is not None:
                found[f"{path}.bias"] = bias.detach().to(dtype)
        return found

    return weights


def _device(linear: nn.Module) -> torch.device:
    return next(t.device for t in (*linear.parameters(), *linear.buffers()))


def settle(model: PreTrainedModel) -> None:
    """Bring the lazy state of quantised maps into place, so that module trees over the same weights share it."""
    # It says at every product that bfloat16 is cast on the way: thousands of lines for one answer.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for module in model.modules():
        prepare = getattr(module, "init_8bit_state", None)  # bitsandbytes moves the scales at the first forward pass
        if prepare is not None and getattr(module.weight, "CB", None) is not None:
            prepare()


def hidden_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Tensors that quantised modules keep outside their parameters and buffers: scales and packed weights."""
    for module in model.modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                yield from _tensors_in(value)


def _tensors_in(value: Any, depth: int = 2) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type)) and not callable(value):
        for inner in vars(value).values():
            yield from _tensors_in(inner, depth - 1)


def _need(name: str, method: str, packages: tuple[str, ...]) -> None:
    missing = [package for package in ("accelerate", *packages) if not _found(package)]
    if missing:
        words = " ".join(package.replace("_", "-").replace("optimum.quanto", "optimum-quanto") for package in missing)
        raise PlantError(
            f"The model {echo(name)} with quantised weights ({method}) needs packages that are not installed: "
            f"pip install {words}.",
            param="quantization",
        )


def _found(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # the parent of a dotted name
        return False
