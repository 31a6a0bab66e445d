"""What is counted in one life of a gateway: numbers, and no library that would tell them.

It hears the gateway's events, and the writer's commits. Nothing here is stored: a counter begins at
zero with the process, and what is in the store is asked of the store. No label holds what a
stranger may choose: a channel that this gateway does not have is `other`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import attrs

from ._events import (
    ChannelFailed,
    DeadLettered,
    Delivered,
    DeliveryDelayed,
    DrainReport,
    Event,
    InputRefused,
    MarkingFailed,
    MessageAccepted,
    MessageRefused,
    ProgressShown,
    ReplyCommitted,
    SettleDelayed,
    StepRemembered,
    StopRequested,
    StoreTrouble,
    TurnBegun,
    TurnInterrupted,
    TurnResumed,
    TurnSettled,
    TurnsMarked,
)
from ._markers import ENDS, ResumeReason
from ._messages import RefusalKind

OTHER: Final = "other"
"""The channel of what came from a channel that this gateway does not have."""

SECONDS: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
    1800.0,
)  # fmt: skip
"""The buckets of what a turn takes: from an echo to half an hour of a model's work."""

SHORT: Final = (0.0001, 0.00025, 0.0005, *SECONDS[:12])
"""The buckets of what should take no time."""

SIZES: Final = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)

OUTCOMES: Final = tuple(sorted(state.value.lower() for state in ENDS))
"""How turns end, as a label says it."""


class Histogram:
    """How often a value was in which bucket. Observed by one thread at a time; read by any."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds: tuple[float, ...] = tuple(bounds)
        self._counts = [0] * (len(self.bounds) + 1)
        self.sum: float = 0.0
        """Of all values."""

    def observe(self, value: float) -> None:
        """Count a value; a clock that was set back is no negative time."""
        value = max(value, 0.0)
        self._counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self._counts)

    def cumulated(self) -> Iterator[tuple[float, int]]:
        """For each upper bound, the infinite one last, how many values were at most that."""
        total = 0
        for bound, count in zip((*self.bounds, float("inf")), tuple(self._counts), strict=True):
            total += count
            yield bound, total


@attrs.define
class _Attempt:
    """An attempt that is open. `waited`: what its oldest message had waited before, in seconds;
    None once something was said, and for one that resumes."""

    since: float
    waited: float | None


class Tally:
    """The numbers of one life. Made by `Gateway.count`."""

    def __init__(self, channels: Sequence[str], now: Callable[[], float]) -> None:
        self._channels = frozenset(channels)
        self._now = now
        self._open: dict[int, _Attempt] = {}
        self._ended: tuple[int, _Attempt] | None = None
        self.accepted: Counter[str] = Counter(dict.fromkeys(channels, 0))
        """Messages that were accepted, by channel; duplicates are not among them."""
        self.duplicates: int = 0
        self.refused: Counter[str] = Counter(dict.fromkeys([kind.value for kind in RefusalKind], 0))
        """By reason."""
        self.unreadable: Counter[str] = Counter(dict.fromkeys(channels, 0))
        """Input that a channel could not read, by channel."""
        self.attempts: int = 0
        self.resumed: Counter[str] = Counter(dict.fromkeys([r.value for r in ResumeReason], 0))
        """Attempts that resumed a turn, by the reason of the interruption."""
        self.settled: Counter[str] = Counter(dict.fromkeys(OUTCOMES, 0))
        """Turns by how they ended."""
        self.interrupted: int = 0
        """Attempts that ended without settling their turn."""
        self.steps: int = 0
        self.tries: Counter[str] = Counter(delivered=0, delayed=0, dead=0)
        """Tries of deliveries, by what became of them."""
        self.marked: int = 0
        self.markings_failed: int = 0
        self.settles_delayed: int = 0
        self.store_troubles: Counter[str] = Counter()
        """By operation."""
        self.channel_failures: Counter[str] = Counter(dict.fromkeys(channels, 0))
        self.phases: dict[str, float] = {}
        """Seconds of each phase of the stop that has ended."""
        self._stop_since: float | None = None
        self.queue_seconds: Histogram = Histogram(SECONDS)
        self.turn_seconds: Histogram = Histogram(SECONDS)
        self.first_text_seconds: Histogram = Histogram(SECONDS)
        self.settle_seconds: Histogram = Histogram(SHORT)
        self.commit_seconds: Histogram = Histogram(SHORT)
        self.commit_operations: Histogram = Histogram(SIZES)
        self.loop_lag_seconds: Histogram = Histogram(SHORT)
        self._handlers = self._all_handlers()

    def _all_handlers(self) -> dict[type[Event], Callable[[Any], None]]:
        return {
            MessageAccepted: self._message_accepted,
            MessageRefused: self._message_refused,
            InputRefused: self._input_refused,
            TurnBegun: self._turn_begun,
            TurnResumed: self._turn_resumed,
            TurnSettled: self._turn_settled,
            TurnInterrupted: self._turn_interrupted,
            ReplyCommitted: self._reply_committed,
            ProgressShown: self._progress_shown,
            StepRemembered: self._step_remembered,
            Delivered: lambda _: self._tried("delivered"),
            DeliveryDelayed: lambda _: self._tried("delayed"),
            DeadLettered: lambda _: self._tried("dead"),
            StopRequested: self._stop_requested,
            TurnsMarked: self._turns_marked,
            MarkingFailed: self._marking_failed,
            DrainReport: self._drain_report,
            SettleDelayed: self._settle_delayed,
            StoreTrouble: self._store_trouble,
            ChannelFailed: self._channel_failed,
        }

    def hear(self, event: Event) -> None:
        """Count an event of the gateway."""
        handler = self._handlers.get(type(event))
        if handler is not None:
            handler(event)

    def note_commit(self, operations: int, seconds: float) -> None:
        """Count a commit. Called on the writer's thread, and on no other."""
        self.commit_operations.observe(operations)
        self.commit_seconds.observe(seconds)

    @property
    def draining_for(self) -> float:
        """Seconds since somebody asked for the stop; zero before."""
        return 0.0 if self._stop_since is None else self._now() - self._stop_since

    def _known(self, channel: str) -> str:
        return channel if channel in self._channels else OTHER

    # ----- messages

    def _message_accepted(self, event: MessageAccepted) -> None:
        if event.duplicate:
            self.duplicates += 1
        else:
            self.accepted[self._known(event.session.channel)] += 1

    def _message_refused(self, event: MessageRefused) -> None:
        self.refused[event.kind.value] += 1

    def _input_refused(self, event: InputRefused) -> None:
        self.unreadable[self._known(event.channel)] += 1

    # ----- turns

    def _turn_begun(self, event: TurnBegun) -> None:
        self.attempts += 1
        self.queue_seconds.observe(event.waited)
        self._open[event.turn] = _Attempt(self._now(), event.waited)

    def _turn_resumed(self, event: TurnResumed) -> None:
        self.attempts += 1
        self.resumed[event.reason.value] += 1
        self._open[event.turn] = _Attempt(self._now(), None)

    def _turn_settled(self, event: TurnSettled) -> None:
        self.settled[event.state.value.lower()] += 1
        if event.settling is not None:
            self.settle_seconds.observe(event.settling)
        attempt = self._open.pop(event.turn, None)
        if attempt is not None:
            self.turn_seconds.observe(self._now() - attempt.since)
            self._ended = (event.turn, attempt)

    def _turn_interrupted(self, event: TurnInterrupted) -> None:
        self.interrupted += 1
        self._open.pop(event.turn, None)

    def _reply_committed(self, event: ReplyCommitted) -> None:
        # A turn's last reply is told right behind its end.
        ended, self._ended = self._ended, None
        attempt = self._open.get(event.turn)
        if attempt is None and ended is not None and ended[0] == event.turn:
            attempt = ended[1]
        self._note_text(attempt)

    def _progress_shown(self, event: ProgressShown) -> None:
        if event.draft and event.text:
            self._note_text(self._open.get(event.turn))

    def _note_text(self, attempt: _Attempt | None) -> None:
        if attempt is not None and attempt.waited is not None:
            self.first_text_seconds.observe(attempt.waited + self._now() - attempt.since)
            attempt.waited = None

    def _step_remembered(self, _: StepRemembered) -> None:
        self.steps += 1

    def _tried(self, outcome: str) -> None:
        self.tries[outcome] += 1

    # ----- the stop

    def _stop_requested(self, _: StopRequested) -> None:
        self._stop_since = self._now()

    def _turns_marked(self, event: TurnsMarked) -> None:
        self.marked += event.count
        self.phases["mark"] = event.seconds

    def _marking_failed(self, _: MarkingFailed) -> None:
        self.markings_failed += 1

    def _drain_report(self, event: DrainReport) -> None:
        self.phases = dict(event.phases)

    # ----- trouble

    def _settle_delayed(self, _: SettleDelayed) -> None:
        self.settles_delayed += 1

    def _store_trouble(self, event: StoreTrouble) -> None:
        self.store_troubles[event.operation] += 1

    def _channel_failed(self, event: ChannelFailed) -> None:
        self.channel_failures[self._known(event.channel)] += 1
