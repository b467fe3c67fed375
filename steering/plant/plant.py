"""The plant: a Hugging Face decoder and what the rest of the product needs to know about it.

    x_{l+1} = f_l(x_l) + u_l,   l = 0 … L−1       layer index in the role of time, B = I

x_l is the residual at the input of block l, x_L the output of the last block, before the final norm.
`Plant.model` itself never carries a hook. Whoever taps takes a `shell`, a module tree of its own over the same weights,
so that the engine, a fit in the background and a Jacobian do not see each other.
"""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from jinja2 import TemplateError
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from steering.errors import PlantError, echo
from steering.plant.fingerprint import fingerprint, stored_fingerprint
from steering.plant.layouts import LAYOUTS, Layout, layout_of
from steering.plant.loading import (
    DTYPES,
    UNLOADABLE,
    Dtype,
    attend,
    device_of,
    load_tokenizer,
    load_weights,
    not_loaded,
    reason_of,
    weight_files,
)
from steering.plant.massive import Caution, Massive, find_massive
from steering.plant.quantised import NONE, as_numbers, chosen, hidden_tensors, is_quantised, quantised_maps, settle
from steering.plant.taps import TapFn, build_in, linear_weight, linears_at, site_width, tap
from steering.plant.team import Crew, Group
from steering.types import Site

Message = dict[str, Any]
"""A chat message: at least `role` and `content`."""

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
        tensor_parallel: int = 1,
    ) -> Plant:
        """Load a causal language model and its tokenizer from a folder or a hub name.

        `dtype="auto"` keeps the checkpoint's number format. `attn` is the attention implementation; None leaves
        transformers' choice (sdpa where the family has it, else eager). Code shipped with a checkpoint is never run.
        `quantization` is a name of `steering.plant.quantised.SCHEMES`, for the linear maps of a checkpoint that is not
        quantised; one that is loads as it is stored. `tensor_parallel` processes share the model: see
        `steering.plant.shared`.

        Raises PlantError, in one sentence, if there is no such model, its architecture is not supported, its files are
        damaged, its tokenizer is missing, the device, dtype or quantization does not exist, a package that is needed is
        not installed, or so many cannot share the model; TeamLost if one of them ends while it loads.
        """
        name = os.fspath(model)
        target = device_of(device)
        if dtype not in DTYPES:
            raise PlantError(f"dtype: expected one of {', '.join(DTYPES)}, got {echo(dtype)}.", param="dtype")
        # A mistyped path must not be asked of the hub, which would retry for half a minute without a network.
        if not os.path.isdir(name) and (name.count("/") != 1 or name.startswith((".", "/", "~"))) and "/" in name:
            raise PlantError(f"The model folder {echo(name)} does not exist.", param="model")
        try:
            config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        except UNLOADABLE as error:
            raise not_loaded(name, error) from error
        if config.model_type not in LAYOUTS:
            raise PlantError(
                f"The architecture {config.model_type!r} of {echo(name)} is not supported: expected one of "
                f"{', '.join(sorted(LAYOUTS))}.",
                param="model",
            )
        scheme, quantiser = chosen(name, quantization, dtype, config)
        if tensor_parallel != 1:
            from steering.plant.shared import load_shared

            return load_shared(name, config, scheme, tensor_parallel, target, dtype=dtype, attn=attn, revision=revision)
        if scheme == NONE:
            loaded = load_weights(name, revision, dtype)
            # float16 cannot hold every value of the checkpoint, and its rounding would change the fingerprint.
            identity = fingerprint(load_weights(name, revision, "auto") if dtype == "float16" else loaded)
            loaded.to(target)
        else:
            loaded = load_weights(name, revision, dtype, device_map={"": target}, quantization_config=quantiser)
            if next(quantised_maps(loaded), None) is None:
                raise PlantError(
                    f"Nothing of {echo(name)} is quantised by {scheme!r}: it finds no linear map in this architecture; "
                    "choose another quantization.",
                    param="quantization",
                )
            settle(loaded)
            identity = stored_fingerprint(weight_files(name, revision), config, scheme)
        if attn is not None and attn != "sdpa":  # transformers chose sdpa already wherever the family has it
            attend(loaded, attn)
        return cls(loaded, load_tokenizer(name, revision), fingerprint=identity, name=name)

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

    @property
    def group(self) -> Group | None:
        """The processes that share the model; None where this one has it alone."""
        return None

    @property
    def crew(self) -> Crew | None:
        """The other processes that share the model, where this one leads them."""
        return None

    def require_whole(self) -> None:
        """Raise PlantError where this process cannot run the model alone, as fits and captures do."""

    def close(self) -> None:
        """End the other processes that share the model, if there are any. Nothing can run on it afterwards."""

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
            attend(shell, attn_implementation)
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
                f"The model's chat template refuses these messages: {reason_of(error)}.", param="messages"
            ) from error
        return cast("list[int]", ids)
