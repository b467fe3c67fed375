"""What is put into each of vLLM's processes, by its entry point `vllm.general_plugins`.

    workers       `WorkerBase.__init__`                            steering.vllm.worker
    engine core   `generate_block_hash_extra_keys`, new requests    steering.vllm.salt
                  `KVCacheConfig.needs_kv_cache_zeroing`            what a diverged request leaves behind
    front         `EngineArgs.create_engine_config`                 what a compiled model needs to be told
                  `AsyncLLM.generate`                               server.vllm_front

vLLM goes on without a plugin that fails to load. So nothing may be steered before all workers have said hello
(`setpoint_hello`), and whoever asks for steering where nobody said it gets an error.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any

from steering.vllm.salt import check_compiled, salted

_MARK = "_setpoint"
"""Set on what is wrapped already: vLLM may load a plugin several times."""


def register(front: Callable[[], None] | None = None) -> None:
    """Put Setpoint into this process's vLLM. Once is enough; more do nothing.

    front: called in the process that takes the requests, before its engine is made. What only some processes need is
    imported there alone.
    """
    from vllm.engine import arg_utils
    from vllm.v1.core import block_pool, kv_cache_utils
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.worker.worker_base import WorkerBase

    _settle_llvmlite()
    if getattr(WorkerBase, _MARK, False):
        return
    setattr(WorkerBase, _MARK, True)
    WorkerBase.__init__ = _steerable(WorkerBase.__init__)

    keys = salted(kv_cache_utils.generate_block_hash_extra_keys)
    kv_cache_utils.generate_block_hash_extra_keys = keys
    block_pool.generate_block_hash_extra_keys = keys
    # Attention multiplies what lies behind a sequence's end by 0, and 0 · NaN is NaN: a block that a diverged request
    # gave back would spoil whoever gets it. vLLM zeroes new blocks where they may hold such things; now they may.
    KVCacheConfig.needs_kv_cache_zeroing = property(lambda config: True)
    preprocess = EngineCore.preprocess_add_request

    def preprocess_add_request(core: Any, request: Any) -> Any:
        check_compiled(request)
        return preprocess(core, request)

    EngineCore.preprocess_add_request = preprocess_add_request

    create = arg_utils.EngineArgs.create_engine_config

    def create_engine_config(args: Any, *more: Any, **named: Any) -> Any:
        if front is not None:
            front()
        return prepared(create(args, *more, **named))

    arg_utils.EngineArgs.create_engine_config = create_engine_config


def _steerable(init: Callable[..., None]) -> Callable[..., None]:
    """vLLM's `WorkerBase.__init__`, after which the worker steers."""

    @wraps(init)
    def init_worker(worker: Any, *args: Any, **kwargs: Any) -> None:
        from steering.vllm.worker import Steerable

        init(worker, *args, **kwargs)
        Steerable(worker)

    return init_worker


def _settle_llvmlite() -> None:
    """Let llvmlite's library answer vLLM's search of all modules for its kernels.

    The library object makes a function of whatever attribute it is asked for; asked for its `__dict__`, vLLM 0.32 on a
    CPU fails at it.
    """
    with suppress(ImportError, AttributeError):
        from llvmlite.binding import ffi

        ffi.lib._fntab.setdefault("__dict__", {})


def prepared(config: Any) -> Any:
    """A configuration of vLLM's under which compiled models keep our operators apart, and are cached apart."""
    from vllm.config import CompilationMode, CUDAGraphMode

    from steering.vllm.traced import OPERATORS
    from steering.vllm.worker import TAPS_VARIABLE, compiled_taps

    compilation = config.compilation_config
    if compilation.mode in (None, CompilationMode.NONE):
        return config
    if compilation.splitting_ops is not None:
        compilation.splitting_ops = [*compilation.splitting_ops, *OPERATORS]
    if compilation.cudagraph_mode is not None and compilation.cudagraph_mode.has_full_cudagraphs():
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE  # a whole graph replays without asking anybody
    config.additional_config = {**config.additional_config, TAPS_VARIABLE.lower(): ",".join(compiled_taps())}
    return config
