"""What is assumed and was not measured here: a machine, a model, a workload, an object store. Each with its source.

Nothing in this file is a result. docs/scale.md prints it as a table of its own, and whoever plans with it replaces it
with figures of their own: `benchmarks.gpu`, `benchmarks.load` and `benchmarks.capacity.costs` measure them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Accelerator:
    """A GPU by its data sheet, and the shares of it that decoding is taken to reach."""

    memory: float = 141e9
    """Bytes (NVIDIA, H200 SXM data sheet)."""
    bandwidth: float = 4.8e12
    """Bytes a second, same source."""
    flops: float = 989e12
    """bfloat16, dense, same source."""
    memory_share: float = 0.9
    bandwidth_share: float = 0.7
    flops_share: float = 0.45
    step_overhead: float = 5e-4
    """Seconds of a step that are the host's, the next one being launched ahead."""
    sequence_overhead: float = 2e-5
    """Seconds a request adds to a step on the host: sampling, text, delivery."""


@dataclass(frozen=True)
class Model:
    """Sizes of a model of eight billion parameters, and of what steers it; the last two by the formats of this code."""

    parameters: float = 8.0e9
    weight_bytes: float = 16.1e9
    layers: int = 32
    width: int = 4096
    kv_heads: int = 8
    head_width: int = 128
    program_slots: int = 256

    @property
    def position_bytes(self) -> int:
        """Keys and values of one position, in bfloat16."""
        return self.layers * 2 * self.kv_heads * self.head_width * 2

    @property
    def concept_bytes(self) -> int:
        """A concept with one kind of gain, in float32: directions of L + 1 states, gains of L blocks, magnitudes."""
        return 4 * ((self.layers + 1) * (self.width + 2) + self.layers * self.width)

    @property
    def program_bytes(self) -> int:
        """A resident program of `lqr` with one concept: probe, gain and five scalars on all blocks but the first."""
        return 4 * (self.layers - 1) * (2 * self.width + 5)


@dataclass(frozen=True)
class Workload:
    """What a request is on average."""

    prompt: int = 512
    cached: float = 0.5
    """Share of the prompt that the prefix cache holds."""
    answer: int = 256
    steered: float = 0.5
    """Share of the requests that name a concept."""
    zipf: float = 1.0
    """Exponent of the popularity of concepts: the k-th is asked for in proportion to k ** -zipf."""

    @property
    def prompt_read(self) -> float:
        """Tokens of a prompt that are computed."""
        return self.prompt * (1 - self.cached)

    @property
    def context(self) -> float:
        """Positions that a decoding request attends to, on average over its answer."""
        return self.prompt + self.answer / 2


@dataclass(frozen=True)
class ObjectStore:
    """An object store by what its vendor writes; latencies are of the order users report within one region."""

    reads_per_second: float = 5500.0
    """GET and HEAD a second and prefix (Amazon S3 user guide, "Best practices design patterns")."""
    lists_per_second: float = 3500.0
    """Taken to be that of the other requests, same source; the guide names no figure for LIST."""
    keys_per_page: int = 1000
    """Most keys that one LIST returns (S3 API reference, ListObjectsV2)."""
    list_seconds: float = 0.08
    key_seconds: float = 1.2e-4
    """Of the client's processor for each key of a listing of S3 (steering.mirror)."""
    read_seconds: float = 0.03
    """First byte of a GET; all of a HEAD or of a GET that finds nothing new."""
    stream_bytes: float = 90e6
    """Bytes a second of one GET."""
    total_bytes: float = 50e9
    """Bytes a second of all together: 400 Gb/s."""


@dataclass(frozen=True)
class Machine:
    """The machine around a replica."""

    disk: float = 1.0e12
    network: float = 3.1e9
    """Bytes a second: 25 Gb/s."""
    boot: float = 120.0
    """Seconds from the request for a machine to a process that starts, image pulled."""
    load: float = 60.0
    """Seconds to load and warm the model from a local disk."""
    mean_life: float = 30 * 86400.0
    """Seconds between failures of one replica, of whatever kind."""
    fit_seconds: float = 10.0
    """Of one concept, examples read and gains computed."""
