"""Metrics of several processes as one exposition: every series keeps its name and gets the label `replica`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from server.metrics import PREFIX

Family = tuple[str, str, str, list[tuple[str, dict[str, str], float]]]
"""Name, documentation, type and samples of one metric: what can be sent to another process."""
GATEWAY = "gateway"
_OWN = frozenset(
    f"{PREFIX}_{name}" for name in ("ready", "http_requests", "admission_rejections", "fit_jobs", "fit_seconds")
)
"""Of what the gateway alone counts: it sees every answer, and its counts outlive a replica's."""
_PROCESS = (f"{PREFIX}_process_", f"{PREFIX}_build_info")


def families(registry: Collector) -> list[Family]:
    """All metrics of a registry."""
    return [
        (one.name, one.documentation, one.type, [(s.name, dict(s.labels), s.value) for s in one.samples])
        for one in registry.collect()
    ]


class Merged(Collector):
    """What `choose_encoder` writes out: the gateway's own metrics, and those of each replica by its name."""

    def __init__(self, gateway: Collector, replicas: Iterable[tuple[str, list[Family]]]) -> None:
        self._parts = [(GATEWAY, families(gateway)), *sorted(replicas, key=lambda part: part[0])]

    def collect(self) -> Iterator[Metric]:
        """Each metric once, with the samples of all processes."""
        found: dict[str, Metric] = {}
        for process, part in self._parts:
            for name, text, kind, samples in part:
                is_gateway = process == GATEWAY
                if is_gateway != (name in _OWN) and not (is_gateway and name.startswith(_PROCESS)):
                    continue
                metric = found.setdefault(name, Metric(name, text, kind))
                for sample, labels, value in samples:
                    metric.add_sample(sample, {**labels, "replica": process}, value)
        yield from found.values()
