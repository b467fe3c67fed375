"""Starting vLLM beside a plant: our settings in its words, and what it refuses in ours.

The engine core runs in this process; with tensor parallelism its workers are processes of their own. On a CPU the pool
of keys and values is sized as the native engine's is, since vLLM would take nine tenths of the machine's memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, get_args

from transformers import PreTrainedModel

from steering.errors import PlantError, SpecError, SteeringError
from steering.plant.plant import Plant
from steering.runtime.cache import free_bytes
from steering.runtime.request import MAX_LOGPROBS
from steering.runtime.settings import EngineSettings
from steering.runtime.wiring import steady_context

ModelImpl = Literal["auto", "vllm", "transformers"]
SHARE = 0.5
"""Of the free memory, what keys and values may take on a CPU."""
CPU_BLOCK = 32
"""Positions of a block there: vLLM's kernels take multiples of it, and its own 128 shares few prompts."""
QUANTIZATIONS = {"none": None, "fp8": "fp8_per_tensor", "int8": "int8_per_channel_weight_only", "nf4": "bitsandbytes"}
"""vLLM's names of the quantizations that both engines have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmSettings(EngineSettings):
    """Sizes and choices of a vLLM engine, fixed at start. Raises SpecError that names the field.

    Of the native engine's, `kv_tokens` None leaves the size of the pool on a GPU to vLLM, `compile` lets it compile and
    record graphs, and `graphs` and `pipeline` mean nothing here.
    """

    max_step_tokens: int = 2048
    """Most tokens of one step."""
    model_impl: ModelImpl = "auto"
    """Whose modelling code runs: vLLM's own, or transformers', which has every site that can be steered. `auto` takes
    vLLM's where there is one."""
    tensor_parallel: int = 1
    """Devices that share the model."""
    quantization: str = "none"
    """How vLLM quantises the linear maps while it loads them: none, fp8, int8 or nf4."""

    def __post_init__(self) -> None:
        super(VllmSettings, self).__post_init__()  # slots make a new class, which a bare super() does not know
        if self.model_impl not in get_args(ModelImpl):
            raise SpecError("model_impl", expected="auto, vllm or transformers", got=self.model_impl)
        if not isinstance(self.tensor_parallel, int) or self.tensor_parallel < 1:
            raise SpecError("tensor_parallel", expected="an integer >= 1", got=self.tensor_parallel)
        if self.quantization not in QUANTIZATIONS:
            names = ", ".join(QUANTIZATIONS)
            raise SpecError("quantization", expected=f"{names} with the vLLM engine", got=self.quantization)


def require_vllm() -> None:
    """Raises SpecError, which says what to install, where vLLM is not, or is without what it needs."""
    if find_spec("vllm") is None:  # not imported: that takes longer than all else that can be wrong
        raise SpecError(
            "engine",
            expected="native, since vLLM is not installed here",
            got="vllm",
            advice="pip install 'setpoint[vllm]' in an environment of its own",
        )


def launch(plant: Plant, settings: VllmSettings, stats: Callable[..., object]) -> Any:
    """vLLM's `LLMEngine` for the checkpoint of `plant`, with a stat logger that `stats` makes.

    Raises SpecError and PlantError in the words of whoever gave the settings.
    """
    require_vllm()
    # Before vLLM reads them: the core in this process, nothing told to anybody, nothing but errors on the terminal.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # standard output has the ready line alone
    context = steady_context(plant)
    if settings.max_model_len is not None and settings.max_model_len > context:
        raise SpecError("max_model_len", expected=f"1 to {context}, the model's context", got=settings.max_model_len)
    try:
        from vllm.platforms import current_platform
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine
        from vllm.v1.executor import Executor

        from steering.vllm.plugin import register

        register()  # here at once; in the workers' processes as the plugin that it is
        keep_apart(plant)
        if current_platform.is_cpu() and settings.tensor_parallel > 1:  # a worker would get a NUMA node of its own
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        config = _arguments(plant, settings, context).create_engine_config(UsageContext.ENGINE_CONTEXT)
        _size_pool(config, settings)
        return LLMEngine(
            vllm_config=config,
            executor_class=Executor.get_class(config),
            log_stats=True,
            stat_loggers=[stats],
            multiprocess_mode=False,
        )
    except SteeringError:
        raise
    except Exception as error:  # of any kind: a loader's, a worker's, pydantic's
        raise PlantError(f"vLLM could not start with this model: {reason(error)}.", param="model") from error


def keep_apart(plant: Plant) -> None:
    """Let the plant go on as it is where vLLM runs transformers' modelling code in the same process.

    vLLM makes the model's class, transformers' own, one that may be compiled, and looks at each instance for whether it
    is; those that it did not make do not say.
    """
    for module in plant.model.modules():
        if isinstance(module, PreTrainedModel):
            module.do_not_compile = True


def _arguments(plant: Plant, settings: VllmSettings, context: int) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    return EngineArgs(
        model=plant.name,
        dtype=str(plant.dtype).removeprefix("torch."),  # "auto" would make float16 of float32
        max_model_len=settings.max_model_len or context,
        max_num_seqs=settings.max_batch,
        max_num_batched_tokens=max(settings.max_step_tokens, settings.max_batch),
        enable_prefix_caching=settings.prefix_cache,
        enforce_eager=not settings.compile,
        model_impl=settings.model_impl,
        tensor_parallel_size=settings.tensor_parallel,
        quantization=QUANTIZATIONS[settings.quantization],
        block_size=CPU_BLOCK if current_platform.is_cpu() else None,
        max_logprobs=MAX_LOGPROBS,
        logprobs_mode="raw_logprobs",
        structured_outputs_config={"backend": "guidance"},
        generation_config="vllm",  # what a request does not say has our defaults, not the checkpoint's
        use_tqdm_on_load=False,
    )


def _size_pool(config: Any, settings: VllmSettings) -> None:
    """Fix the number of blocks, where it is asked for or vLLM's own choice is not one."""
    from vllm.platforms import current_platform

    cache, longest = config.cache_config, config.model_config.max_model_len
    one = -(-longest // cache.block_size)
    if settings.kv_tokens is not None:
        blocks = -(-settings.kv_tokens // cache.block_size)
        if blocks < one:
            expected = f"at least {longest}, max_model_len"
            raise SpecError(
                "kv_tokens", expected=expected, got=settings.kv_tokens, advice="raise it, or lower max_model_len"
            )
    elif not current_platform.is_cpu():
        return
    else:
        blocks = settings.max_batch * one
    if current_platform.is_cpu():
        each = _block_bytes(config)
        affordable = int(free_bytes(_cpu()) * SHARE) // each
        if affordable < max(one, blocks if settings.kv_tokens else 0):
            setting, value = ("kv_tokens", settings.kv_tokens) if settings.kv_tokens else ("max_model_len", longest)
            room = f"keys and values that fit in half of the free memory, at {each // cache.block_size} bytes a token"
            raise SpecError(setting, expected=room, got=value, advice="lower it")
        blocks = min(blocks, affordable)
        cache.kv_cache_memory_bytes = (blocks + 1) * each
    cache.num_gpu_blocks_override = blocks + 1  # the first one is nobody's


def _block_bytes(config: Any) -> int:
    """Memory of one block in all layers of one worker."""
    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    width = 2 * model.get_num_kv_heads(parallel) * model.get_head_size() * model.dtype.itemsize
    return int(model.get_num_layers(parallel) * width * cache.block_size)


def _cpu() -> Any:
    import torch

    return torch.device("cpu")


def reason(error: BaseException) -> str:
    """A foreign error in a line, without its traceback or the paths in it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[-1] if lines else type(error).__name__
    return (line if len(line) <= 240 else line[:239] + "…").rstrip(".")
