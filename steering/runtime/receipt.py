"""What was done, from what the kernels measured: never from what was asked.

Per gauge (a term and one of its routes) the projection z is averaged over the tokens at which the term acted and put
into the caller's units, (z − origin)/scale. `mean` averages over the layers whose input the program has already had
the chance to move: all but the first, when there are several; `error` is its distance from the setpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field

import numpy as np

from steering.condition import When
from steering.program import Program, Term
from steering.runtime.launches import Reading, write_sites
from steering.runtime.request import LayerReading
from steering.runtime.scope import Spot, Steered
from steering.types import Route, Site


@dataclass(frozen=True, slots=True)
class Tracking:
    """How well one term's setpoint was held, in the caller's units. Means are NaN where nothing was measured."""

    setpoint: float | None
    units: str
    sites: tuple[Site, ...]
    by_layer: tuple[float, ...]
    is_edit: bool = False
    """Whether what is reported is what an edit met at its own site, in which case the first layer tells as much."""
    is_before: bool = False
    """Whether it was measured where the law itself then wrote: the distance that it met, not the one that it left."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The layer of each site."""
        return tuple(site.layer for site in self.sites)

    @property
    def mean(self) -> float:
        """Average over the layers that the program could move."""
        moved = self.by_layer[1:] if len(self.by_layer) > 1 and not self.is_edit else self.by_layer
        return sum(moved) / len(moved)

    @property
    def error(self) -> float:
        """|setpoint − mean|; NaN without a setpoint, or where the law acted at the same site, after it was measured."""
        return math.nan if self.setpoint is None or self.is_before else abs(self.setpoint - self.mean)

    def to_json(self) -> dict[str, object]:
        """As in the response."""
        sites = {"sites": [str(site) for site in self.sites]} if self.is_edit or self.is_before else {}
        return sites | {
            "setpoint": _number(self.setpoint),
            "mean": _number(self.mean),
            "error": _number(self.error),
            "units": self.units,
            "layers": list(self.layers),
            "by_layer": [_number(value) for value in self.by_layer],
        }


@dataclass(frozen=True, slots=True)
class Condition:
    """How often the condition of one intervention was asked and met, and the mean of what it measured, in its units."""

    intervention: int
    when: When
    asked: int
    met: int
    mean: float

    def to_json(self) -> dict[str, object]:
        """As in the response."""
        when = {name: value for name, value in asdict(self.when).items() if value is not None}
        measured = {"asked": self.asked, "met": self.met, "mean": _number(self.mean)}
        return {"intervention": self.intervention, **when, **measured}


@dataclass(frozen=True, slots=True)
class Receipt:
    """The measured account of a steered request.

    effort: `mean` and `max` of ‖u_l‖/‖x_l‖ over layers and tokens, `sum_…` of its sum over the layers of a token (what
    `Guard.max_effort` bounds), `saturated_tokens`. Where several routes write one site, as in S-PID, it is the sum of
    their parts' efforts, each relative to the state it reads: an upper bound. kl, with `Guard.max_kl`: `mean` and `max`
    divergence from the unsteered twin in nats, and `limited_tokens`. conditions: one entry for each conditioned term.
    """

    fingerprint: str
    tokens_steered: int
    tracking: Mapping[str, Tracking]
    effort: Mapping[str, float]
    kl: Mapping[str, float] | None = None
    conditions: tuple[Condition, ...] = ()

    def to_json(self) -> dict[str, object]:
        """As in the response; numbers that are not finite become null, which JSON can carry."""
        body: dict[str, object] = {
            "fingerprint": self.fingerprint,
            "tokens_steered": self.tokens_steered,
            "tracking": {label: tracking.to_json() for label, tracking in self.tracking.items()},
            "effort": {name: _number(value) for name, value in self.effort.items()},
        }
        if self.kl is not None:
            body["kl"] = {name: _number(value) for name, value in self.kl.items()}
        if self.conditions:
            body["conditions"] = [condition.to_json() for condition in self.conditions]
        return body


@dataclass(slots=True)
class _Gauge:
    """One reported measurement: a term's first channel on one of its routes."""

    label: str
    term: Term
    route: Route
    channel: int
    origin: float
    scale: float

    @property
    def is_edit(self) -> bool:
        """Whether it is of an edit, which is met and spent at one site."""
        return self.route.form != "law"

    def in_units(self, projection: float) -> float:
        """A measured projection in the caller's units; NaN where their scale is 0."""
        return (projection - self.origin) / self.scale if self.scale else math.nan


@dataclass(slots=True)
class Sums:
    """What the T tokens of a batch measured in `steps` steps in which the same ones were steered in the same way.

    measured_TPR: sums of the projections. sum_T, most_T: sum and maximum of their total effort. top_T: the largest
    effort at one site. saturated_T: in how many steps a bound bit.
    """

    steps: int
    routes: tuple[Route, ...]
    measured_TPR: np.ndarray
    sum_T: np.ndarray
    most_T: np.ndarray
    top_T: np.ndarray
    saturated_T: np.ndarray


@dataclass(slots=True)
class Tally:
    """Running sums of one request's measurements.

    settle: called before a receipt is read, by whoever holds sums that were not given out yet.
    """

    program: Program
    gauges: list[_Gauge] = field(init=False)
    n_sites: int = field(init=False)
    tokens: int = 0
    effort_sum: float = 0.0
    effort_max: float = 0.0
    total_max: float = 0.0
    saturated: int = 0
    kls: list[float] = field(default_factory=list)
    kl_limited: int = 0
    settle: Callable[[], None] | None = None
    _asked: dict[int, tuple[int, int, float]] = field(default_factory=dict)
    _sum_G: np.ndarray = field(init=False)
    _count_G: np.ndarray = field(init=False)
    _channel_G: np.ndarray = field(init=False)
    _column_G: np.ndarray = field(init=False)
    _routes: tuple[Route, ...] | None = None
    _last: Steered | None = None
    _is_whole: bool = False

    def __post_init__(self) -> None:
        self.gauges = _gauges(self.program)
        # A meter's site is not one where control could be spent: it would only dilute the mean effort.
        self.n_sites = len(write_sites(tuple(r for r, law in self.program.laws.items() if not law.is_idle)))
        self._sum_G = np.zeros(len(self.gauges))
        self._count_G = np.zeros(len(self.gauges), dtype=np.int64)
        self._channel_G = np.array([gauge.channel for gauge in self.gauges], dtype=np.int64)

    def add(self, steered: Steered, reading: Reading) -> bool:
        """Add one segment's measurements. False if the control was not finite: nothing is added then."""
        total_T, saturated_T = reading.total_T, reading.saturated_T != 0
        if not math.isfinite(total_T[steered.tokens_K].sum()):
            return False
        self.take(steered, Sums(1, reading.routes, reading.measured_TPR, total_T, total_T, reading.top_T, saturated_T))
        return True

    def take(self, steered: Steered, sums: Sums) -> None:
        """Add one segment's share of a batch's sums, which are finite."""
        tokens_K = steered.tokens_K
        if not len(tokens_K):  # every gate was closed
            return
        self.tokens += sums.steps * len(tokens_K)
        self.effort_sum += float(sums.sum_T[tokens_K].sum())
        self.effort_max = max(self.effort_max, float(sums.top_T[tokens_K].max()))
        self.total_max = max(self.total_max, float(sums.most_T[tokens_K].max()))
        self.saturated += int(sums.saturated_T[tokens_K].sum())
        if self.gauges:
            self._take_projections(steered, sums)

    def _take_projections(self, steered: Steered, sums: Sums) -> None:
        column_G = self._columns(sums.routes)
        if steered is not self._last:  # the same object in every step of steady decoding
            self._last = steered
            self._is_whole = len(steered.tokens_K) == 1 and bool(steered.active_KR[:, self._channel_G].all())
        if self._is_whole:
            self._sum_G += sums.measured_TPR[steered.tokens_K[0], column_G, self._channel_G]
            self._count_G += sums.steps
            return
        active_KG = steered.active_KR[:, self._channel_G]
        read_KG = sums.measured_TPR[steered.tokens_K[:, None], column_G, self._channel_G]
        self._sum_G += np.where(active_KG, read_KG, 0).sum(axis=0, dtype=np.float64)
        self._count_G += sums.steps * active_KG.sum(axis=0)

    def _columns(self, routes: tuple[Route, ...]) -> np.ndarray:
        """Where each gauge's route stands among those of a step."""
        if routes is not self._routes:
            index = {route: p for p, route in enumerate(routes)}
            self._routes = routes
            self._column_G = np.array([index[gauge.route] for gauge in self.gauges], dtype=np.int64)
        return self._column_G

    def add_kl(self, kl: float, is_limited: bool) -> None:
        """Add one token's divergence from the unsteered twin."""
        self.kls.append(kl)
        self.kl_limited += is_limited

    def add_gate(self, spot: Spot, measured_K: np.ndarray) -> None:
        """Add what a gate measured in one step."""
        asked, met, total = self._asked.get(spot.term, (0, 0, 0.0))
        met += sum(spot.gate.is_open(float(z)) for z in measured_K)
        self._asked[spot.term] = (asked + len(measured_K), met, total + float(measured_K.sum()))

    def _conditions(self) -> tuple[Condition, ...]:
        found = []
        for n, term in enumerate(self.program.terms):
            if term.gate is not None:
                asked, met, total = self._asked.get(n, (0, 0, 0.0))
                mean = term.gate.in_units(total / asked) if asked else math.nan
                found.append(Condition(n, term.gate.when, asked, met, mean))
        return tuple(found)

    def trace(self, steered: Steered, reading: Reading, token: int) -> tuple[LayerReading, ...]:
        """The readings at one token (a row of the packed batch) of a steered segment; empty if it is not steered."""
        found = np.flatnonzero(steered.tokens_K == token)
        if not len(found):
            return ()
        active_R = steered.active_KR[found[0]]
        gauged = [
            LayerReading(
                gauge.label,
                gauge.route.read.layer,
                gauge.in_units(float(reading.measured_TPR[token, p, gauge.channel])),
                gauge.term.target,
                sum(
                    float(reading.effort_WT[w, token])
                    for w, site in enumerate(reading.sites)
                    if (site == gauge.route.write if gauge.is_edit else site.layer == gauge.route.read.layer)
                ),
            )
            for gauge, p in zip(self.gauges, self._columns(reading.routes).tolist(), strict=True)
            if active_R[gauge.channel]
        ]
        return (*gauged, *self._efforts(active_R, reading, token))

    def _efforts(self, active_R: np.ndarray, reading: Reading, token: int) -> Iterator[LayerReading]:
        """What the terms without a gauge spent at one token, site by site."""
        for term, channels in zip(self.program.terms, self.program.channels, strict=True):
            if term.gauges or not active_R[channels].any():
                continue
            for site in write_sites(tuple(sorted(term.laws))):
                effort = float(reading.effort_WT[reading.sites.index(site), token])
                yield LayerReading(term.label, site.layer, math.nan, term.target, effort)

    def receipt(self) -> Receipt:
        """The account so far."""
        if self.settle is not None:
            self.settle()
        with np.errstate(invalid="ignore", divide="ignore"):
            mean_G = self._sum_G / self._count_G
        tracking: dict[str, Tracking] = {}
        for label in dict.fromkeys(gauge.label for gauge in self.gauges):
            own = [(g, float(z)) for g, z in zip(self.gauges, mean_G, strict=True) if g.label == label]
            tracking[label] = Tracking(
                own[0][0].term.target,
                own[0][0].term.units,
                tuple(g.route.read for g, _ in own),
                tuple(g.in_units(z) for g, z in own),
                own[0][0].is_edit,
                not own[0][0].is_edit and own[0][0].route.read == own[0][0].route.write,
            )
        steered = max(self.tokens, 1)
        effort = {
            "mean": self.effort_sum / (steered * max(self.n_sites, 1)),
            "max": self.effort_max,
            "saturated_tokens": self.saturated,
            "sum_mean": self.effort_sum / steered,
            "sum_max": self.total_max,
        }
        kl = None
        if self.program.guard.max_kl is not None:
            kl = {
                "mean": sum(self.kls) / max(len(self.kls), 1),
                "max": max(self.kls, default=0.0),
                "limited_tokens": self.kl_limited,
            }
        return Receipt(self.program.fingerprint, self.tokens, tracking, effort, kl, self._conditions())


def _gauges(program: Program) -> list[_Gauge]:
    """The gauges of a program, layers ascending within a term; a label that comes again gets "#2", "#3", …."""
    gauges: list[_Gauge] = []
    seen: dict[str, int] = {}
    for term, channels in zip(program.terms, program.channels, strict=True):
        if not term.gauges:
            continue
        seen[term.label] = seen.get(term.label, 0) + 1
        label = term.label if seen[term.label] == 1 else f"{term.label}#{seen[term.label]}"
        for route in sorted(term.gauges, key=lambda route: (route.read.layer, route)):
            origin, scale = term.gauges[route]
            gauges.append(_Gauge(label, term, route, channels.start, origin, scale))
    return gauges


def _number(value: float | None) -> float | None:
    """The number if it is finite, to the seven digits that float32 has, else None."""
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.7g}")
