"""The plant: a Hugging Face decoder and what the rest of the product needs to know about it.

    x_{l+1} = f_l(x_l) + u_l,   l = 0 … L−1       layer index in the role of time, B = I

x_l is the residual at the input of block l, x_L the output of the last block, before the final norm.
`Plant.model` itself never carries a hook. Whoever taps takes a `shell`, a module tree of its own over the same weights,
so that the engine, a fit in the background and a Jacobian do not see each other.
"""

from __future__ import annotations

import copy
import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from huggingface_hub import snapshot_download
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from steering.errors import PlantError, echo
from steering.plant.fingerprint import fingerprint, stored_fingerprint
from steering.plant.layouts import LAYOUTS, Layout, layout_of
from steering.plant.massive import Caution, Massive, find_massive
from steering.plant.quantised import NONE, as_numbers, chosen, hidden_tensors, is_quantised, quantised_maps, settle
from steering.plant.taps import TapFn, build_in, linear_weight, linears_at, site_width, tap
from steering.types import Site

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
Message = dict[str, Any]
"""A chat message: at least `role` and `content`."""

_UNLOADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError)
"""What `from_pretrained` raises for absent, unreadable or damaged files."""
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


@dataclass(frozen=True, slots=True)
class Heads:
    """Query heads, key and value heads, and the width of one. At `attn_act` head h has columns h·width and on."""

    count: int
    kv_count: int
    width: int


class Plant:
    """The uncontrolled system. Wraps a loaded model; `Plant.load` makes one from a path or a hub name.

    Freezes `model` (evaluation mode, no gradients for weights).
    Raises PlantError if its architecture is not supported.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        fingerprint: str | None = None,
        name: str = "",
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.layout: Layout = layout_of(model)
        self.name = name or str(model.config._name_or_path)
        self._tokenizer = tokenizer
        self._fingerprint = fingerprint
        self._widths: dict[Site, int] = {}
        config = model.config.get_text_config()
        self.depth = int(config.num_hidden_layers)
        """L, the number of blocks."""
        self.width = int(config.hidden_size)
        """D, the width of the residual stream."""
        self.vocab = int(model.get_output_embeddings().weight.shape[0])
        """V, the number of logits."""
        self.context = int(config.max_position_embeddings)
        """Most positions a sequence may have."""

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: Dtype = "auto",
        attn: str | None = None,
        revision: str | None = None,
        quantization: str = NONE,
    ) -> Plant:
        """Load a causal language model and its tokenizer from a folder or a hub name.

        `dtype="auto"` keeps the checkpoint's number format. `attn` is the attention implementation; None leaves
        transformers' choice (sdpa where the family has it, else eager). Code shipped with a checkpoint is never run.
        `quantization` is a name of `steering.plant.quantised.SCHEMES`, for the linear maps of a checkpoint that is not
        quantised; one that is loads as it is stored.

        Raises PlantError, in one sentence, if there is no such model, its architecture is not supported, its files are
        damaged, its tokenizer is missing, the device, dtype or quantization does not exist, or a package that the
        quantization needs is not installed.
        """
        name = os.fspath(model)
        target = _device(device)
        if dtype not in DTYPES:
            raise PlantError(f"dtype: expected one of {', '.join(DTYPES)}, got {echo(dtype)}.", param="dtype")
        # A mistyped path must not be asked of the hub, which would retry for half a minute without a network.
        if not os.path.isdir(name) and (name.count("/") != 1 or name.startswith((".", "/", "~"))) and "/" in name:
            raise PlantError(f"The model folder {echo(name)} does not exist.", param="model")
        try:
            config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        except _UNLOADABLE as error:
            raise _not_loaded(name, error) from error
        if config.model_type not in LAYOUTS:
            raise PlantError(
                f"The architecture {config.model_type!r} of {echo(name)} is not supported: expected one of "
                f"{', '.join(sorted(LAYOUTS))}.",
                param="model",
            )
        scheme, quantiser = chosen(name, quantization, dtype, config)
        if scheme == NONE:
            loaded = _weights(name, revision, dtype)
            # float16 cannot hold every value of the checkpoint, and its rounding would change the fingerprint.
            identity = fingerprint(_weights(name, revision, "auto") if dtype == "float16" else loaded)
            loaded.to(target)
        else:
            loaded = _weights(name, revision, dtype, device_map={"": target}, quantization_config=quantiser)
            if next(quantised_maps(loaded), None) is None:
                raise PlantError(
                    f"Nothing of {echo(name)} is quantised by {scheme!r}: it finds no linear map in this architecture; "
                    "choose another quantization.",
                    param="quantization",
                )
            settle(loaded)
            identity = stored_fingerprint(_files(name, revision), config, scheme)
        if attn is not None and attn != "sdpa":  # transformers chose sdpa already wherever the family has it
            _attend(loaded, attn)
        return cls(loaded, _tokenizer(name, revision), fingerprint=identity, name=name)

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the checkpoint, `sha256:…`: see `steering.plant.fingerprint`. Independent of dtype and device."""
        return self._fingerprint or fingerprint(self.model)

    @cached_property
    def massive(self) -> Massive:
        """The model's massive activations: see `steering.plant.massive`. Costs a forward pass when first asked for."""
        return find_massive(self)

    @property
    def caution(self) -> Caution:
        """What every write into this model's residual stream leaves alone."""
        return Caution(self.massive.dims, self.massive.first, self.layout.norm == "layer")

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer. Raises PlantError if the plant was made without one."""
        if self._tokenizer is None:
            raise PlantError(
                "This model was loaded without a tokenizer: give token ids instead of text.", param="prompt"
            )
        return self._tokenizer

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the weights."""
        return self.model.dtype

    def width_of(self, site: Site) -> int:
        """Width of the tensor at `site`. Raises PlantError if the model has no such site."""
        if site not in self._widths:  # remembered: looking takes 70 us, and every request asks for each of its routes
            self._widths[site] = site_width(self.model, self.layout, site)
        return self._widths[site]

    def linears_at(self, site: Site) -> list[Tensor]:
        """The weights (E_out, E_in) of the linear maps that read `site`, float32 on the CPU; of quantised ones too.

        Raises PlantError where none does, or where quantised ones cannot be run.
        """
        return [
            as_numbers(module, self.dtype, torch.float32).cpu()
            if is_quantised(module)
            else linear_weight(module).detach().float().cpu()
            for module in linears_at(self.model, self.layout, site)
        ]

    @property
    def heads(self) -> Heads:
        """How the attention is divided."""
        config = self.model.config.get_text_config()
        n = int(config.num_attention_heads)
        width = self.width_of(Site("attn_act", 0)) // n
        return Heads(n, int(getattr(config, "num_key_value_heads", None) or n), width)

    def shell(self, attn_implementation: str | None = None) -> PreTrainedModel:
        """A second module tree over the same weights: own modules, own configuration, own hooks, no tensor copied.

        `attn_implementation` is the attention of the new tree (None: the one of `model`); forward-mode derivatives need
        "eager". Hooks of `model` are not carried over.
        Raises PlantError if the model does not have this attention.
        """
        shared = (*self.model.parameters(), *self.model.buffers(), *hidden_tensors(self.model))
        memo: dict[int, Any] = {id(t): t for t in shared}
        for module in self.model.modules():
            memo |= {id(hooks): OrderedDict() for name in _HOOKS if (hooks := module.__dict__[name])}
        shell: PreTrainedModel = copy.deepcopy(self.model, memo)
        # Set by transformers when it hooks its modules to record hidden states: those hooks stayed behind.
        for module in shell.modules():
            module.__dict__.pop("_output_capturing_hooks_installed", None)
        if attn_implementation is not None:
            _attend(shell, attn_implementation)
        return shell

    def tap(self, shell: nn.Module, site: Site, fn: TapFn) -> RemovableHandle:
        """`steering.plant.taps.tap` with this plant's layout, on one of its shells."""
        return tap(shell, self.layout, site, fn)

    def build_in(self, shell: nn.Module, layer: int, fn: TapFn) -> None:
        """`steering.plant.taps.build_in` with this plant's layout, on one of its shells."""
        build_in(shell, self.layout, layer, fn)

    def encode(self, prompt: str | Sequence[Message], *, open_end: bool = False, answer: bool = False) -> list[int]:
        """Token ids of a text (with the tokenizer's special tokens) or of a chat.

        A chat that ends with the user or the system gets the template's generation prompt. One that ends with the
        assistant is encoded whole, with its end token, as training data would be; with `open_end` it is left open, for
        the model to continue that message, and with `answer` it gets the generation prompt too, for another turn.
        Raises PlantError if nothing is left after tokenisation, the model has no chat template, or the template refuses
        the messages.
        """
        ids = self._text(prompt) if isinstance(prompt, str) else self._chat(prompt, open_end, answer)
        if not ids:
            raise PlantError("The prompt is empty after tokenisation: expected at least one token.", param="prompt")
        return ids

    def _text(self, prompt: str) -> list[int]:
        return list(self.tokenizer(prompt, verbose=False).input_ids)  # what is too long is refused by whoever runs it

    def _chat(self, messages: Sequence[Message], open_end: bool, answer: bool) -> list[int]:
        if not messages:
            raise PlantError("The chat is empty: expected at least one message.", param="messages")
        if not self.tokenizer.chat_template:
            raise PlantError(
                f"The model {echo(self.name)} has no chat template: send a text prompt instead of messages.",
                param="messages",
            )
        try:
            ends_with_answer = messages[-1]["role"] == "assistant"
            ids = self.tokenizer.apply_chat_template(
                list(messages),
                add_generation_prompt=answer or not ends_with_answer,
                continue_final_message=open_end and ends_with_answer,
                tokenize=True,
                return_dict=False,
                tokenizer_kwargs={"verbose": False},
            )
        except (TemplateError, KeyError, TypeError, ValueError) as error:
            raise PlantError(
                f"The model's chat template refuses these messages: {_reason(error)}.", param="messages"
            ) from error
        return cast("list[int]", ids)


def _device(device: str | torch.device) -> torch.device:
    """The device, after checking that a tensor can be put there."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise PlantError(f"The device {str(device)!r} cannot be used: {_reason(error)}.", param="device") from error


def _attend(model: PreTrainedModel, attn: str) -> None:
    """Give `model` this attention implementation. Raises PlantError if it does not have it."""
    try:
        model.set_attn_implementation(attn)
    except (ValueError, ImportError) as error:
        raise PlantError(
            f"The attention {attn!r} is not available for this model: {_reason(error)}.", param="attn"
        ) from error


def _weights(name: str, revision: str | None, dtype: Dtype, **quantised: Any) -> PreTrainedModel:
    """The checkpoint's model, on the CPU unless it is loaded `quantised`.

    Raises PlantError if it cannot be loaded, or not all of it.
    """
    given = {key: value for key, value in quantised.items() if value is not None}
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            name, revision=revision, dtype=dtype, output_loading_info=True, trust_remote_code=False, **given
        )
    except _UNLOADABLE as error:
        raise _not_loaded(name, error) from error
    if info["missing_keys"]:  # transformers would go on with random weights
        first = min(info["missing_keys"])
        raise PlantError(
            f"The model {echo(name)} is incomplete: {len(info['missing_keys'])} weights are missing, the first is "
            f"{first}; download it again.",
            param="model",
        )
    return cast(PreTrainedModel, loaded)


def _files(name: str, revision: str | None) -> list[Path]:
    """The safetensors files of a checkpoint that has been loaded. Raises PlantError if it has none."""
    folder = Path(name if os.path.isdir(name) else snapshot_download(name, revision=revision, local_files_only=True))
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.exists():
        return sorted({folder / file for file in json.loads(index.read_text())["weight_map"].values()})
    if not (folder / SAFE_WEIGHTS_NAME).exists():
        raise PlantError(
            f"The model {echo(name)} has no safetensors files, which a quantised model is identified by: convert it.",
            param="model",
        )
    return [folder / SAFE_WEIGHTS_NAME]


def _tokenizer(name: str, revision: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer beside the weights. Raises PlantError if it is missing or damaged."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
        files = sorted({"tokenizer.json", *tokenizer.vocab_files_names.values()})
        if os.path.isdir(name) and not any(os.path.exists(os.path.join(name, file)) for file in files):
            # Some families then get an empty vocabulary without a word.
            raise FileNotFoundError(f"none of {', '.join(files)} is there")
    except Exception as error:  # every tokenizer class fails in its own way without its files
        raise PlantError(
            f"The model {echo(name)} has no usable tokenizer ({_reason(error)}): put its tokenizer files beside the "
            "weights.",
            param="model",
        ) from error
    return cast(PreTrainedTokenizerBase, tokenizer)


def _not_loaded(name: str, error: Exception) -> PlantError:
    return PlantError(
        f"The model {echo(name)} cannot be loaded ({_reason(error)}): expected a folder with a Hugging Face "
        "checkpoint, or the name of one that the hub cache holds or the network can reach.",
        param="model",
    )


def _reason(error: Exception) -> str:
    """The first line of an error, without its full stop: libraries add paragraphs of advice."""
    lines = str(error).strip().splitlines()
    reason = lines[0].strip().rstrip(".") if lines else type(error).__name__
    return reason if len(reason) <= 160 else reason[:159] + "…"
