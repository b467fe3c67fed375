"""vLLM offline in a process of its own: requests in, tokens and receipts out, as JSON.

    python -m tests.vllm.offline JOB RESULT

A job has `settings`, what vLLM's `LLM` is made with, and `rounds` of requests, each round one batch. vLLM changes the
classes of transformers in its process, so the native engine that it is compared with runs elsewhere.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steering import Program
from steering.demo import MODEL

ROOT = Path(__file__).parents[2]


def asked(prompt: Sequence[int], program: Program | None = None, max_tokens: int = 8) -> dict[str, Any]:
    """One greedy request of a round."""
    from steering.wire import pack

    packed = None if program is None or not program.acts else base64.b64encode(pack(program)).decode()
    return {"prompt": list(prompt), "program": packed, "max_tokens": max_tokens}


def run(
    folder: Path,
    rounds: Sequence[Sequence[dict[str, Any]]],
    env: dict[str, str] | None = None,
    module: str = "tests.vllm.offline",
    **settings: Any,
) -> dict[str, Any]:
    """The result of a job; `settings` go to vLLM, `env` to its process, which runs `module`."""
    job, result = folder / "job.json", folder / "result.json"
    job.write_text(json.dumps({"settings": settings, "rounds": rounds}))
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    own = os.environ | quiet | {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    call = [sys.executable, "-m", module, str(job), str(result)]
    done = subprocess.run(
        call, cwd=ROOT, env=own | (env or {}), capture_output=True, text=True, timeout=280, check=False
    )
    if not result.exists():
        raise AssertionError(f"vLLM ended with {done.returncode}:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def with_interpreter() -> None:
    """Let vLLM's newer runner, which wants Triton, have its interpreter where Triton has no backend for a CPU."""
    from triton.backends import backends

    class Driver:
        @staticmethod
        def is_active() -> bool:
            return True

    class Backend:
        driver = Driver
        compiler = None

    backends.setdefault("cpu", Backend)


def main(job: Path, result: Path) -> None:
    """Run a job."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
        with_interpreter()
    from vllm import LLM, SamplingParams

    from steering.vllm.account import Accounts
    from steering.vllm.attachment import KEY, Attachment
    from steering.wire import unpack

    told = json.loads(job.read_text())
    defaults = {"max_model_len": 256, "max_num_seqs": 8, "dtype": "float32", "block_size": 32}
    llm = LLM(str(MODEL), kv_cache_memory_bytes=2**26, **(defaults | told["settings"]))
    found: dict[str, Any] = {"hello": llm.collective_rpc("setpoint_hello"), "rounds": []}
    accounts, n = Accounts(), 0
    for requests in told["rounds"]:
        params, tallies = [], []
        for request in requests:
            n, extra, tally = n + 1, {}, None
            if request["program"] is not None:
                program = unpack(base64.b64decode(request["program"]))
                extra = {KEY: Attachment.of(str(n), program, len(request["prompt"])).to_args()}
                tally = accounts.open(str(n), program, len(request["prompt"]))
            tallies.append((str(n), tally))
            params.append(
                SamplingParams(temperature=0, max_tokens=request["max_tokens"], ignore_eos=True, extra_args=extra)
            )
        prompts = [{"prompt_token_ids": request["prompt"]} for request in requests]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        for parcel in llm.collective_rpc("setpoint_take"):
            accounts.file(parcel)
        found["rounds"].append([])
        for request, output, (name, tally) in zip(requests, outputs, tallies, strict=True):
            tokens = list(output.outputs[0].token_ids)
            one: dict[str, Any] = {"tokens": tokens, "cached": output.num_cached_tokens}
            if tally is not None:
                settled = accounts.settle(name, len(request["prompt"]) + len(tokens) - 1)
                one |= {"lost": settled.is_lost, "error": settled.error, "receipt": tally.receipt().to_json()}
            found["rounds"][-1].append(one)
    result.write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # whatever vLLM's threads still wait for


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
