"""The vLLM engine on two ranks in a process of its own: a job of `tests.vllm.offline`, and then a worker that dies.

python -m tests.vllm.ranks JOB RESULT
"""

from __future__ import annotations

import base64
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from steering import Delta, Finished, Plant, Program, Request, Sampling, VllmEngine, VllmSettings
from steering.demo import MODEL
from steering.errors import SteeringError
from steering.wire import unpack


def killed(engine: VllmEngine) -> dict[str, Any]:
    """What becomes of a request whose worker is killed, of who watches the engine, and of the next request."""
    from psutil import Process

    heard, ended, began = list[str](), list[Finished](), threading.Event()
    done, told = threading.Event(), threading.Event()

    def deliver(event: Delta | Finished) -> None:
        began.set()
        if isinstance(event, Finished):
            ended.append(event)
            done.set()

    def hear(error: SteeringError) -> None:
        heard.append(type(error).__name__)
        told.set()

    engine.on_loss(hear)
    sampling = Sampling(max_tokens=200, temperature=0, ignore_eos=True)
    engine.submit(Request("last", (5, 6, 7), sampling), deliver)
    began.wait(60)
    workers = [child for child in Process().children(recursive=True) if "Worker" in child.name()]
    workers[-1].kill()
    done.wait(60)
    told.wait(60)
    try:
        engine.submit(Request("late", (5, 6, 7), sampling), deliver)
        after = ""
    except SteeringError as error:
        after = type(error).__name__
    return {"ended": type(ended[0].error).__name__, "heard": heard, "after": after, "workers": len(workers)}


def main(job: Path, result: Path) -> None:
    """Run a job."""
    told = json.loads(job.read_text())
    settings = VllmSettings(max_batch=8, max_model_len=256, tensor_parallel=2, **told["settings"])
    engine = VllmEngine(Plant.load(MODEL), settings)
    (asked,) = told["rounds"]
    requests = []
    for n, one in enumerate(asked):
        program = Program() if one["program"] is None else unpack(base64.b64decode(one["program"]))
        sampling = Sampling(max_tokens=one["max_tokens"], temperature=0, ignore_eos=True)
        requests.append(Request(str(n), tuple(one["prompt"]), sampling, program))
    ends = [
        {
            "tokens": end.tokens,
            "lost": False,
            "error": None if end.error is None else end.error.message,
            "receipt": None if end.receipt is None else end.receipt.to_json(),
        }
        for end in engine.generate(requests)
    ]
    found = {"ranks": engine.handshake.ranks, "rounds": [ends], "killed": killed(engine)}
    result.write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # whatever vLLM's threads still wait for


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
