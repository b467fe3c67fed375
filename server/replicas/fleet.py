"""The processes on Ray Serve, of this machine or of a cluster: the copies that serve, and the one that writes.

    APP-N-serving    `replicas` to `max_replicas` copies          APP-N-writing    one copy

N counts the rolling restarts. Ray is imported here and nowhere else, when it is first used.
"""

from __future__ import annotations

import asyncio
import io
import logging
import os
import secrets
import shutil
import sys
import tempfile
import threading
import uuid
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from starlette.types import Message

from server.replicas.actor import Actor
from server.replicas.copies import Busy, Generation, Lost, Nobody
from server.settings import ServerSettings
from steering import SpecError, SteeringError

SPARE_CALLS = 64
"""Calls beside those that generate which a replica may have, and calls that may wait in the gateway."""
BUSY = 0.75
"""Calls on a replica, as a share of its batch, above which the autoscaler starts another one."""
GRACE_SECONDS = 600.0
"""How long a replica that the autoscaler takes away may finish its calls."""
LOOK_SECONDS = 0.25
"""Pause between two looks at whether a generation runs."""
log = logging.getLogger("setpoint")


@dataclass(frozen=True)
class Share:
    """What one process is given."""

    threads: int
    gpus: int


class RayFleet:
    """A `Fleet` on Ray Serve."""

    def __init__(self, settings: ServerSettings) -> None:
        settings.require_ray()
        _prepare(settings)
        self._settings = settings
        self._name = f"setpoint-{uuid.uuid4().hex[:8]}"
        self._count = 0
        self._folder: str | None = None
        self._apps: dict[int, list[str]] = {}
        self._is_given_up = threading.Event()

    def give_up(self) -> None:
        """See `Fleet`."""
        self._is_given_up.set()

    def start(self) -> None:
        """Start Ray on this machine, for this process alone, or join a cluster. Raises SteeringError."""
        import ray
        from ray import serve

        address = self._settings.ray_address
        for name in ("ray", "ray.serve"):
            logging.getLogger(name).setLevel(logging.ERROR)
        sys.stdout = _Lines()  # Ray prints there whose process has died
        for tries_left in (1, 0):  # on a busy machine Ray's 30 seconds may be too few for it to start
            try:
                self._init(address)
                break
            except Exception as error:  # Ray raises just that when it takes too long
                log.error("ray", exc_info=error)
                ray.shutdown()
                self._sweep()
                if address is not None or not tries_left or self._is_given_up.is_set():
                    name = "ray_address" if address else "replicas"
                    raise SpecError(name, expected="Ray to start", got=str(error)[:200]) from error
        serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})

    def _init(self, address: str | None) -> None:
        import ray

        common = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": self._name}
        if address is not None:
            ray.init(address=address, **common)
            return
        _sweep_folders()
        self._folder = tempfile.mkdtemp(prefix=f"{_FOLDER}{os.getpid()}-")  # short: it holds sockets
        everyone = 2 * (self._settings.most_replicas + 1)  # with those of a rolling restart
        ray.init(
            address="local",
            num_cpus=everyone * self._share().threads,
            object_store_memory=max(2**28, 2 * self._settings.upload_limit),  # taken as it is used
            include_dashboard=False,
            _temp_dir=self._folder,
            **common,
        )

    def deploy(self) -> Generation:
        """Start a generation and wait until all of it answers. Raises SteeringError."""
        import ray
        from ray import serve

        if self._is_given_up.is_set() or not ray.is_initialized():  # Ray Serve would start another Ray, open to all
            raise SteeringError("The server ends: no replica is started any more.")
        share = self._share()
        self._count += 1
        number = self._count
        self._require_room(share)
        names = [f"{self._name}-{number}-{part}" for part in ("serving", "writing")]
        targets = [
            serve.RunTarget(target=self._application(is_writer, share), name=name, route_prefix=None)
            for name, is_writer in zip(names, (False, True), strict=True)
        ]
        self._apps[number] = names
        try:
            serving, writing = serve.run_many(targets, wait_for_applications_running=False)
            self._wait(names)
        except RuntimeError as error:
            if self._is_given_up.is_set():  # `stop` ends what was begun
                raise SteeringError("The server was told to end while replicas were loading.") from error
            del self._apps[number]
            for name in names:
                log.error("not started", extra={"fields": {"application": name, "reason": _reason(name)}})
                serve.delete(name)
            raise SteeringError("The replicas could not be started; the log says why.") from error
        return Generation(number, RayCopies(serving), RayCopies(writing))

    def _wait(self, names: list[str]) -> None:
        """Wait until some applications run. Raises RuntimeError where one cannot, or the server ends."""
        from ray import serve

        while not self._is_given_up.wait(LOOK_SECONDS):
            known = serve.status().applications
            states = [known[name].status if name in known else "DEPLOYING" for name in names]
            if all(state == "RUNNING" for state in states):
                return
            if any(state in ("DEPLOY_FAILED", "UNHEALTHY") for state in states):
                break
        raise RuntimeError("not running")

    def delete(self, generation: Generation) -> None:
        """End a generation, at once: nothing runs there any more."""
        from ray import serve

        for name in self._apps.pop(generation.number):
            serve.delete(name)

    def stop(self) -> None:
        """End all processes, and Ray where it was started here."""
        import ray
        from ray import serve

        if not ray.is_initialized():
            return
        if self._settings.ray_address is not None:
            for name in [name for names in self._apps.values() for name in names]:
                with suppress(Exception):  # the cluster may be gone
                    serve.delete(name)
        ray.shutdown()
        self._sweep()

    def _sweep(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _application(self, is_writer: bool, share: Share) -> Any:
        from ray import serve

        settings, gpus = self._settings, share.gpus
        if is_writer and gpus and _free_gpus() < gpus * (settings.replicas + 1):
            log.warning("no GPU is left for the process that fits: it uses a CPU")
            settings, gpus = replace(settings, device="cpu"), 0
        places = settings.max_batch + settings.queue_limit
        scale: dict[str, Any] = {"num_replicas": 1 if is_writer else settings.replicas}
        if not is_writer and settings.most_replicas > settings.replicas:
            scale = {
                "autoscaling_config": {
                    "min_replicas": settings.replicas,
                    "max_replicas": settings.most_replicas,
                    "target_ongoing_requests": max(1.0, BUSY * settings.max_batch),
                    "upscale_delay_s": 10.0,
                    "downscale_delay_s": 300.0,  # a model takes long to load: what was started is kept for a while
                }
            }
        deployment = serve.deployment(
            Actor,
            name="writer" if is_writer else "replica",
            ray_actor_options={"num_cpus": share.threads, "num_gpus": gpus},
            max_ongoing_requests=places + SPARE_CALLS,
            max_queued_requests=SPARE_CALLS,
            health_check_period_s=2.0,
            health_check_timeout_s=30.0,
            graceful_shutdown_timeout_s=GRACE_SECONDS,
            graceful_shutdown_wait_loop_s=0.5,
            logging_config={"log_level": "ERROR", "enable_access_log": False},
            **scale,
        )
        # The keys are the gateway's to check. Nobody else reaches a replica.
        return deployment.bind(replace(settings, api_key=None, admin_key=None, insecure=True), is_writer)

    def _share(self) -> Share:
        """Threads and devices of one process: the machine's cores shared out, or as OMP_NUM_THREADS says."""
        settings = self._settings
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        given = os.environ.get("OMP_NUM_THREADS", "")
        threads = int(given) if given.isdigit() and int(given) else max(1, cores // (settings.most_replicas + 1))
        if settings.ray_address is not None and not given.isdigit():
            threads = 1
        is_engine_free = settings.engine == "vllm" or settings.device == "auto"  # to take a GPU where there is one
        on_gpu = settings.device == "cuda" or (is_engine_free and _free_gpus() > 0)
        return Share(threads, settings.tensor_parallel if on_gpu else 0)

    def _require_room(self, share: Share) -> None:
        """Raises SteeringError when a generation would wait for devices for ever."""
        free = _free_gpus()
        if share.gpus and free < share.gpus * self._settings.replicas:
            raise SpecError(
                "replicas",
                expected=f"at most {int(free) // share.gpus}, for as many the free GPUs suffice",
                got=self._settings.replicas,
            )


class RayCopies:
    """The replicas behind one handle of Ray Serve."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def call(self, scope: dict[str, Any], body: bytes) -> AsyncGenerator[list[Message], None]:
        """See `Copies`."""
        return self._stream("call", scope, body)

    def stream(self, method: str) -> AsyncGenerator[Any, None]:
        """See `Copies`."""
        return self._stream(method)

    async def each(self, method: str, *arguments: object, seconds: float = 5.0) -> list[Any]:
        """See `Copies`."""
        from ray.serve.exceptions import DeploymentUnavailableError

        try:
            asked = self._handle.broadcast(method, *arguments)
            found = await asked.results_async(timeout_s=seconds, return_exceptions=True)
        except DeploymentUnavailableError as error:
            raise Nobody from error
        return [one for one in found if not isinstance(one, BaseException)]

    async def _stream(self, method: str, *arguments: object) -> AsyncGenerator[Any, None]:
        from ray.exceptions import RayError, RayTaskError
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

        items = self._handle.options(stream=True, method_name=method).remote(*arguments)
        is_over = False
        try:
            async for item in items:
                yield item
            is_over = True
        except BackPressureError as error:
            raise Busy from error
        except DeploymentUnavailableError as error:
            raise Nobody from error
        except RayTaskError:  # a defect of ours, told as such
            raise
        except (RayError, asyncio.CancelledError) as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise
            raise Lost from error
        finally:
            if not is_over:
                items.cancel()


class _Lines(io.TextIOBase):
    """A stream whose lines go to the log."""

    def write(self, text: str) -> int:
        """Log what is more than white space."""
        if text.strip():
            log.warning("ray", extra={"fields": {"said": text.strip()[:1000]}})
        return len(text)


_FOLDER = "setpoint-ray-"


def _prepare(settings: ServerSettings) -> None:
    """Set what Ray reads when it is imported: it tells nobody that it is used, and a cluster of our own has a key of
    its own."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    is_local = settings.ray_address is None
    if is_local:  # Ray's own switch for "loopback only", which is the default where its name says
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    if is_local and "RAY_AUTH_TOKEN_PATH" not in os.environ and os.environ.get("RAY_AUTH_MODE", "token") == "token":
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _free_gpus() -> float:
    import ray

    return float(ray.available_resources().get("GPU", 0)) if ray.is_initialized() else 0.0


def _reason(application: str) -> str:
    """What Ray Serve says of an application that did not start."""
    from ray import serve

    found = serve.status().applications.get(application)
    parts = [] if found is None else [found.message, *(one.message for one in found.deployments.values())]
    return "\n".join(part for part in parts if part)[-2000:]


def _sweep_folders() -> None:
    """Delete what gateways of this machine that were killed left behind."""
    for path in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*"):
        owner = path.name.removeprefix(_FOLDER).partition("-")[0]
        if owner.isdecimal() and not Path(f"/proc/{owner}").exists() and Path("/proc/self").exists():
            shutil.rmtree(path, ignore_errors=True)
