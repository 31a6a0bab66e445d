"""`GET /metrics`: the numbers of the gateway, for Prometheus.

Counters and histograms are the kernel's tally, of this process and no other. What mirrors the store
is asked of the store at each scrape, by one reader that no number of scrapes can pile up behind: an
answer that takes too long is left out, and `trio_gateway_store_readable` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import attrs
import trio
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from .._errors import StoreError
from .._gateway import Gateway, GatewayState
from .._tally import Histogram, Tally
from ..store import Gauges

if TYPE_CHECKING:
    from ._house import House

PREFIX: Final = "trio_gateway_"

MOST: Final = 100_000
"""Rows that one gauge counts at the most."""

STORE_TIME: Final = 2.0
"""Seconds that a scrape waits for the store."""

LAG_EVERY: Final = 0.5
"""Seconds between two looks at how late the event loop is."""

Labels: TypeAlias = tuple[str, ...]
Values: TypeAlias = Mapping[Labels, float] | Histogram | float | None
"""What a metric has: a value for each of its labels; one value; or nothing to tell."""


@attrs.frozen
class Scrape:
    """What one scrape tells. `gauges`: None where the store did not answer. `now` is the time in
    seconds since 1970."""

    tally: Tally
    state: GatewayState
    paused: bool
    statistics: Mapping[str, int]
    gauges: Gauges | None
    now: float


@attrs.frozen
class Spec:
    """One metric, without the prefix and the suffix that Prometheus gives a counter."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    told: str
    read: Callable[[Scrape], Values]
    labels: Labels = ()

    @property
    def full_name(self) -> str:
        """As it is queried: of a histogram, without `_bucket`, `_sum` and `_count`."""
        return f"{PREFIX}{self.name}{'_total' if self.kind == 'counter' else ''}"

    def family(self, scrape: Scrape) -> Metric | None:
        """As the library takes it; None where there is nothing to tell."""
        values = self.read(scrape)
        if values is None:
            return None
        name, told = f"{PREFIX}{self.name}", self.told
        if isinstance(values, Histogram):
            buckets = [(_bound(bound), float(count)) for bound, count in values.cumulated()]
            return HistogramMetricFamily(name, told, buckets=buckets, sum_value=values.sum)
        kind = CounterMetricFamily if self.kind == "counter" else GaugeMetricFamily
        family = kind(name, told, labels=self.labels)
        for labels, value in (values if isinstance(values, Mapping) else {(): values}).items():
            family.add_metric(labels, value)
        return family


def _bound(bound: float) -> str:
    return "+Inf" if bound == float("inf") else repr(bound)


def _by(counted: Mapping[str, float]) -> dict[Labels, float]:
    return {(label,): float(value) for label, value in counted.items()}


def _stored(read: Callable[[Gauges], Values]) -> Callable[[Scrape], Values]:
    return lambda scrape: None if scrape.gauges is None else read(scrape.gauges)


def _oldest(scrape: Scrape) -> Values:
    if scrape.gauges is None:
        return None
    oldest = scrape.gauges.oldest_undelivered
    return 0.0 if oldest is None else max(0.0, scrape.now - oldest.timestamp())


SPECS: Final = (
    Spec("info", "gauge", "1; the label says which version this is.",
         lambda _: {(version("trio-gateway"),): 1.0}, ("version",)),
    Spec("state", "gauge", "1 for the state that the gateway is in, 0 for the others.",
         lambda s: {(one.value,): float(one is s.state) for one in GatewayState}, ("state",)),
    Spec("paused", "gauge", "1 while turns are kept from beginning, by hand.",
         lambda s: float(s.paused)),
    # messages
    Spec("messages_accepted", "counter", "Messages that are on disk, by channel.",
         lambda s: _by(s.tally.accepted), ("channel",)),
    Spec("messages_duplicate", "counter", "Messages that were sent again and recognised.",
         lambda s: s.tally.duplicates),
    Spec("messages_refused", "counter", "Messages that the inbox did not take, by reason.",
         lambda s: _by(s.tally.refused), ("reason",)),
    Spec("input_unreadable", "counter", "Input that a channel could not read, by channel.",
         lambda s: _by(s.tally.unreadable), ("channel",)),
    Spec("messages_queued", "gauge", "Messages that wait for a turn, in the store.",
         _stored(lambda g: g.waiting)),
    # turns
    Spec("open_turns", "gauge", "Turns that have not settled, by their marker in the store.",
         _stored(lambda g: {("running",): g.running, ("resume_pending",): g.resume_pending}),
         ("state",)),
    Spec("turns_running", "gauge", "Turns that run in this process.",
         lambda s: s.statistics["turns_running"]),
    Spec("turn_slots_free", "gauge", "Turns that could begin at once (limits.turns).",
         lambda s: s.statistics["slots_free"]),
    Spec("turn_attempts", "counter", "Attempts of turns that have begun, resumed ones included.",
         lambda s: s.tally.attempts),
    Spec("turns_resumed", "counter", "Attempts that resumed a turn, by what had interrupted it.",
         lambda s: _by(s.tally.resumed), ("reason",)),
    Spec("turns_settled", "counter", "Turns that have ended, by how.",
         lambda s: _by(s.tally.settled), ("outcome",)),
    Spec("turns_interrupted", "counter", "Attempts that ended without settling their turn.",
         lambda s: s.tally.interrupted),
    Spec("turns_marked", "counter", "Turns that a stop has marked, to be resumed.",
         lambda s: s.tally.marked),
    Spec("markings_failed", "counter", "Times that a stop could not mark the open turns.",
         lambda s: s.tally.markings_failed),
    Spec("steps_remembered", "counter", "Steps whose results were kept.",
         lambda s: s.tally.steps),
    Spec("quarantined_messages", "gauge", "Messages of turns that were put aside, in the store.",
         _stored(lambda g: g.quarantined)),
    Spec("queue_seconds", "histogram", "From the first message of a turn, accepted, to its begin.",
         lambda s: s.tally.queue_seconds),
    Spec("first_text_seconds", "histogram",
         "From the first message, accepted, to the first text that is said; of first attempts.",
         lambda s: s.tally.first_text_seconds),
    Spec("turn_seconds", "histogram", "From the begin of a turn's last attempt to its settle.",
         lambda s: s.tally.turn_seconds),
    Spec("settle_seconds", "histogram", "From the agent's end to the settle that is on disk.",
         lambda s: s.tally.settle_seconds),
    Spec("settles_delayed", "counter", "Settles that could not be written, and are tried again.",
         lambda s: s.tally.settles_delayed),
    # the store
    Spec("commit_seconds", "histogram", "What a transaction of the writer takes, fsync included.",
         lambda s: s.tally.commit_seconds),
    Spec("commit_operations", "histogram", "Operations that shared a transaction.",
         lambda s: s.tally.commit_operations),
    Spec("store_troubles", "counter", "Operations that the store failed, by kind.",
         lambda s: _by(s.tally.store_troubles), ("operation",)),
    Spec("store_readable", "gauge",
         "1 if the store answered this scrape in time; else its gauges are missing.",
         lambda s: float(s.gauges is not None)),
    # the outbox
    Spec("outbox_deliveries", "gauge", "Deliveries that have not arrived, in the store.",
         _stored(lambda g: g.undelivered)),
    Spec("outbox_oldest_seconds", "gauge",
         "How long ago the oldest delivery that has not arrived was committed.", _oldest),
    Spec("delivery_tries", "counter", "Tries of deliveries, by what became of them.",
         lambda s: _by(s.tally.tries), ("outcome",)),
    Spec("dead_letters", "gauge", "Deliveries that were given up and wait for a person.",
         _stored(lambda g: g.dead_letters)),
    Spec("channel_failures", "counter", "Times that a channel fell over, by channel.",
         lambda s: _by(s.tally.channel_failures), ("channel",)),
    # the process
    Spec("drain_seconds", "gauge", "Since somebody asked for the stop; 0 before.",
         lambda s: s.tally.draining_for),
    Spec("drain_phase_seconds", "gauge", "What each phase of the stop took, once it has ended.",
         lambda s: _by(s.tally.phases), ("phase",)),
    Spec("loop_lag_seconds", "histogram", "How late the event loop is, looked at twice a second.",
         lambda s: s.tally.loop_lag_seconds),
)  # fmt: skip


class _Numbers(Collector):
    """One scrape, for the registry."""

    def __init__(self) -> None:
        self.scrape: Scrape | None = None

    def collect(self) -> Iterator[Metric]:
        if self.scrape is not None:
            for spec in SPECS:
                if (family := spec.family(self.scrape)) is not None:
                    yield family

    def describe(self) -> Iterable[Metric]:
        return ()


class Metrics:
    """Counts for one gateway, and tells. `run` is its life."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._tally = gateway.count()
        self._numbers = _Numbers()
        # Never the library's global one: it is the agent's, and counts once a process.
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._registry.register(self._numbers)
        self._wanted = trio.Event()
        self._answer = _Answer()

    async def run(self) -> None:
        """Read the store for scrapes, and look at the loop, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read_store)
            nursery.start_soon(self._watch_loop)

    async def told(self, accept: str) -> tuple[bytes, str]:
        """The numbers as they are now, in the format that a client prefers, and its media type."""
        gauges = await self._gauges()
        gateway = self._gateway
        encode, media_type = choose_encoder(accept)
        self._numbers.scrape = Scrape(
            self._tally,
            gateway.state.value,
            gateway.paused,
            gateway.statistics(),
            gauges,
            gateway.clock.now().wall / 1_000_000,
        )
        return encode(self._registry), media_type

    # ----- the store

    async def _gauges(self) -> Gauges | None:
        answer = self._answer
        self._wanted.set()
        with trio.move_on_after(STORE_TIME):
            await answer.ready.wait()
        return answer.gauges

    async def _read_store(self) -> None:
        """One read at a time. Those who ask during one are answered by the next."""
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            answer, self._answer = self._answer, _Answer()
            try:
                answer.gauges = await self._gateway.inspect(lambda reader: reader.gauges(MOST))
            except StoreError:
                answer.gauges = None  # which the scrape says
            answer.ready.set()

    # ----- the loop

    async def _watch_loop(self) -> None:
        while True:
            due = trio.current_time() + LAG_EVERY
            await trio.sleep_until(due)
            self._tally.loop_lag_seconds.observe(trio.current_time() - due)


@attrs.define(eq=False)
class _Answer:
    """What the store says to one or more scrapes."""

    ready: trio.Event = attrs.field(factory=trio.Event)
    gauges: Gauges | None = None


async def get_metrics(house: House, request: Request) -> Response:
    """GET /metrics"""
    body, media_type = await house.metrics.told(request.headers.get("accept", ""))
    return Response(body, headers={"content-type": media_type, "cache-control": "no-store"})
