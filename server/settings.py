"""What a server is told when it starts: frozen, checked once, every field with a `SETPOINT_…` environment variable."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from steering import SpecError

ENV_PREFIX = "SETPOINT_"


def located(text: str) -> Path | str:
    """A store as it is named: a URL stays one, all else is a folder."""
    return text if "://" in text else Path(text)


def default_store() -> Path | str:
    """$SETPOINT_STORE, else the platform's folder for user data."""
    if chosen := os.environ.get(f"{ENV_PREFIX}STORE"):
        return located(chosen)
    if os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData/Local"))
    else:
        base = Path(os.environ.get("XDG_DATA_HOME", Path.home() / ".local/share"))
    return base / "setpoint" / "store"


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings of one server. Raises SpecError that names the option."""

    model: str | None = None
    """Folder or hub id; None: the embedded demo model."""
    served_model_name: str | None = None
    """Id under which the model is served; None: `setpoint-demo`, or the last part of `model`."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free port."""
    engine: Literal["native", "vllm"] = "native"
    """What generates: Setpoint's own engine, or vLLM."""
    model_impl: Literal["auto", "vllm", "transformers"] = "auto"
    """Whose modelling code the vLLM engine runs; transformers' has every site that can be steered."""
    device: str = "auto"
    """A torch device; `auto` takes a GPU where there is one. With the vLLM engine, which finds its devices itself, that
    of the model beside it: for fits, traces and captures; `auto` is the CPU."""
    dtype: str = "auto"
    """auto, float32, bfloat16 or float16."""
    max_batch: int = 32
    """Requests that run at once."""
    max_model_len: int | None = None
    """Longest prompt and completion together, in tokens; None: the model's context."""
    kv_tokens: int | None = None
    """Tokens whose keys and values are kept, of running requests and remembered prompts; None: for max_batch requests
    of full length, as far as half of the free memory allows."""
    prefix_cache: bool = True
    """Whether prompts with the same beginning share its keys and values."""
    compile: bool = False
    """Whether torch compiles the feed-forward modules: seconds at the start, for larger models."""
    queue_limit: int = 256
    """Requests that may wait; more are refused with a 429."""
    api_key: str | None = field(default=None, repr=False)
    """Required as a bearer token when set, except for the health checks."""
    admin_key: str | None = field(default=None, repr=False)
    """Required as a bearer token by calls that write, when set; it reads and generates as well."""
    insecure: bool = False
    """Allow a host that others can reach without an API key, and any name of this machine in the Host header."""
    store: Path | str | None = None
    """Folder of the artifacts, or the URL of one that several servers share; None: `default_store()`."""
    drain_seconds: float = 30.0
    """How long running requests may take to finish after SIGTERM."""
    body_limit: int = 2**20
    """Largest request body, in bytes."""
    body_seconds: float = 30.0
    """How long a request's body may pause before the request is given up."""
    upload_limit: int = 2**28
    """Largest artifact that may be uploaded, in bytes."""
    replicas: int = 1
    """Copies of the model that answer, each a process of its own behind one gateway where there are several."""
    max_replicas: int | None = None
    """Copies that may be started when `replicas` are busy; None: no more."""
    ray_address: str | None = None
    """The Ray cluster that runs the copies, HOST:PORT or auto; None: processes of this machine."""
    tensor_parallel: int = 1
    """Devices that share the model, each with a process of its own where there are several."""
    quantization: str = "none"
    """none, int8, int8-dynamic, fp8, nf4 or int8-outliers: how the linear maps are quantized while they are loaded."""

    def __post_init__(self) -> None:
        least_of = {"max_batch": 1, "queue_limit": 1, "body_limit": 1, "upload_limit": 1, "body_seconds": 0.1}
        for name, least in {**least_of, "drain_seconds": 0}.items():
            if not getattr(self, name) >= least:
                raise SpecError(name, expected=f"a number >= {least}", got=getattr(self, name))
        if not 0 <= self.port <= 65535:
            raise SpecError("port", expected="0 to 65535", got=self.port)
        for name in ("max_model_len", "kv_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise SpecError(name, expected="an integer >= 1", got=value)
        self._check_engine()
        for name in ("api_key", "admin_key"):
            key = getattr(self, name)
            if key is not None and not key.strip():
                raise SpecError(name, expected="a key that is not empty", advice="leave it out to serve without one")
        self._check_replicas()
        if self.tensor_parallel < 1:
            raise SpecError("tensor_parallel", expected="an integer >= 1", got=self.tensor_parallel)
        if self.tensor_parallel > 1 and self.is_replicated and self.engine == "native":
            raise SpecError(
                "tensor_parallel",
                expected="1 with replicas",
                got=self.tensor_parallel,
                advice="start a server for each group of devices, and a load balancer before them",
            )
        if not (self.is_loopback or self.api_key or self.insecure):
            raise SpecError(
                "host",
                expected="a loopback address when there is no API key",
                got=self.host,
                advice="set --api-key, or --insecure to serve anyone who can reach this machine",
            )

    def _check_engine(self) -> None:
        """Raises SpecError for an engine that there is not, and for what the one chosen does not have."""
        hints = get_type_hints(type(self))
        for name in ("engine", "model_impl"):
            if (value := getattr(self, name)) not in (names := get_args(hints[name])):
                raise SpecError(name, expected=" or ".join(names), got=value)
        if self.engine == "native" and self.model_impl != "auto":
            raise SpecError("model_impl", expected="auto where the engine is native", got=self.model_impl)

    def _check_replicas(self) -> None:
        if self.replicas < 1:
            raise SpecError("replicas", expected="an integer >= 1", got=self.replicas)
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise SpecError("max_replicas", expected=f"at least the {self.replicas} replicas", got=self.max_replicas)
        if self.ray_address is not None and "://" in self.ray_address:
            raise SpecError(
                "ray_address",
                expected="HOST:PORT or auto",
                got=self.ray_address,
                advice="start this on a node of Ray's",
            )
        if self.is_replicated and self.device.startswith("cuda:"):
            raise SpecError(
                "device", expected="cuda, auto or cpu with replicas, which share the GPUs out", got=self.device
            )

    @property
    def is_replicated(self) -> bool:
        """Whether a gateway stands in front of copies of the model."""
        return self.replicas > 1 or self.max_replicas is not None or self.ray_address is not None

    @property
    def most_replicas(self) -> int:
        """Copies that answer, at most."""
        return self.max_replicas or self.replicas

    def require_ray(self) -> None:
        """Raises SpecError that names what asks for Ray Serve, where that is not installed. Without importing it."""
        if self.is_replicated and find_spec("ray") is None:
            given = {"ray_address": self.ray_address, "max_replicas": self.max_replicas, "replicas": self.replicas}
            name, got = next((name, value) for name, value in given.items() if value is not None)
            none = "1" if name == "replicas" else "nothing"
            advice = "pip install 'setpoint[ray]'"
            raise SpecError(name, expected=f"{none}, where Ray Serve is not installed", got=got, advice=advice)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach `host`."""
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def is_local_only(self) -> bool:
        """Whether only programs of this machine are meant to call: then a web page under another name must not."""
        return self.is_loopback and not self.api_key and not self.insecure

    @property
    def store_place(self) -> Path | str:
        """The folder of the artifacts, or its URL."""
        return self.store or default_store()

    @classmethod
    def from_env(cls) -> ServerSettings:
        """Settings from `SETPOINT_…` variables alone, for servers that are not started by the command line."""
        hints = get_type_hints(cls)
        given: dict[str, Any] = {}
        for one in fields(cls):
            text = os.environ.get(f"{ENV_PREFIX}{one.name.upper()}")
            if text:
                given[one.name] = _parsed(one.name, text, hints[one.name])
        return cls(**given)


def _parsed(name: str, text: str, hint: object) -> object:
    """`text` as the type of a field: the first of bool, int, float and Path that the annotation names, else itself."""
    named = str(hint)
    try:
        if "bool" in named:
            return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[text.lower()]
        return (
            int(text)
            if "int" in named
            else float(text)
            if "float" in named
            else located(text)
            if "Path" in named
            else text
        )
    except (ValueError, KeyError) as error:
        raise SpecError(f"{ENV_PREFIX}{name.upper()}", expected="a value of the setting's type", got=text) from error
