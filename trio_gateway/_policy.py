"""Every decision, as a pure function: what is so goes in, what to do comes out.

No Trio, no database, no clock, no randomness: callers hand in the time that has passed and the
dice that were thrown.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from enum import StrEnum
from functools import cache
from math import ceil
from typing import TYPE_CHECKING, Final

import attrs

from ._errors import InvalidInput, shown
from ._markers import Marker, ResumeReason
from ._messages import Message, RefusalKind, SessionKey, is_channel_name, is_traceparent

if TYPE_CHECKING:
    import regex

# ----- limits and settings that decisions need


@attrs.frozen(kw_only=True)
class Limits:
    """What one gateway takes on. Sizes are bytes of UTF-8, lengths characters."""

    turns: int = 100
    """Turns at once, over all sessions."""
    message_bytes: int = 1024 * 1024
    key_length: int = 1024
    """Of session names and message ids."""
    open_per_session: int = 100
    """Messages of one session that have not reached an end."""
    open_messages: int = 100_000
    """Messages of all sessions that have not reached an end."""
    deliveries: int = 100
    """Deliveries being sent at once, over all destinations of one channel."""


class Busy(StrEnum):
    """What happens to a message that arrives during a turn of its session."""

    QUEUE = "queue"
    """It waits; one turn each."""
    COLLECT = "collect"
    """It waits; all that wait go into the next turn together."""
    INTERRUPT = "interrupt"
    """The turn is stopped; the next one gets both."""
    STEER = "steer"
    """The running agent can take it; what it does not take waits."""
    REJECT = "reject"
    """It is refused, and the sender is told."""


@attrs.frozen(kw_only=True)
class ResumeRules:
    """When an interrupted turn goes on, and when it ends instead."""

    within: timedelta | None = timedelta(hours=1)
    """Interrupted longer ago than this: expired. None: no limit."""
    max_crashes: int = 3
    """Open at this many crashes: quarantined."""
    max_interruptions: int = 10
    """Interrupted by this many planned stops without progress: quarantined."""
    concurrency: int = 20
    """Resumed turns at once; the rest wait in line."""


SUSPECT_AT: Final = 2
"""A turn that was open at this many crashes runs with no other suspect beside it."""


# ----- the inbox


@attrs.frozen
class Refusal:
    """Why a message is not accepted, in words for its sender, and whether that may change.

    `for_log` says more than its sender is to know.
    """

    reason: str
    retryable: bool = False
    kind: RefusalKind = RefusalKind.MALFORMED
    for_log: str | None = None


def admit(
    message: Message, limits: Limits, *, open_in_session: int, open_in_all: int
) -> Refusal | None:
    """Whether the inbox takes `message`: None, or the refusal."""
    return malformed(message, limits) or no_room(limits, open_in_session, open_in_all)


def malformed(message: Message, limits: Limits) -> Refusal | None:
    """What is wrong with the message itself, whatever the state of the inbox."""
    for what, text in (("session", message.session), ("id", message.id)):
        if refusal := _bad_key(what, text, limits.key_length):
            return refusal
    if not isinstance(message.channel, str) or not is_channel_name(message.channel):
        return Refusal(f"channel {shown(message.channel)}: expected small letters, digits, _ and -")
    if message.sender is not None and (
        refusal := _bad_key("sender", message.sender, limits.key_length)
    ):
        return refusal
    if message.traceparent is not None and not is_traceparent(message.traceparent):
        got = shown(message.traceparent)
        return Refusal(f"traceparent: expected a W3C trace context, 00-…-…-01, got {got}")
    return _bad_text(message.text, limits.message_bytes)


def _bad_key(what: str, text: object, length: int) -> Refusal | None:
    if not isinstance(text, str):
        return Refusal(f"{what}: expected a string, got {type(text).__name__}")
    if not text:
        return Refusal(f"{what}: must not be empty")
    if len(text) > length:
        return Refusal(f"{what}: {len(text)} characters, at most {length} are taken")
    if (at := lone_surrogate(text)) is not None:
        return Refusal(f"{what}: not Unicode text (a lone surrogate at character {at})")
    return None


def _bad_text(text: object, limit: int) -> Refusal | None:
    if not isinstance(text, str):
        return Refusal(f"text: expected a string, got {type(text).__name__}")
    if (at := lone_surrogate(text)) is not None:
        return Refusal(f"text: not Unicode text (a lone surrogate at character {at})")
    if len(text) * 4 > limit and (size := len(text.encode())) > limit:
        return Refusal(f"text: {size} bytes, at most {limit} are taken", kind=RefusalKind.TOO_LARGE)
    return None


def no_room(limits: Limits, open_in_session: int, open_in_all: int) -> Refusal | None:
    """Whether the inbox is too full for one more message of a session."""
    if open_in_session >= limits.open_per_session:
        return Refusal(
            f"this session already has {open_in_session} messages waiting; try again later",
            retryable=True,
            kind=RefusalKind.FULL,
        )
    if open_in_all >= limits.open_messages:
        return Refusal("the inbox is full; try again later", retryable=True, kind=RefusalKind.FULL)
    return None


def check_key(key: object) -> None:
    """Raise `InvalidInput` for what cannot be the key of a session."""
    if not isinstance(key, SessionKey):
        raise InvalidInput(f"session: expected a SessionKey, got {type(key).__name__}")
    for name, text in (("channel", key.channel), ("name", key.name)):
        if not isinstance(text, str) or lone_surrogate(text) is not None:
            raise InvalidInput(f"session.{name}: expected Unicode text, got {shown(text)}")


def check_limit(limit: object) -> None:
    """Raise `InvalidInput` for what cannot say how many lines are wanted."""
    if not isinstance(limit, int):
        raise InvalidInput(f"limit: expected an integer, got {type(limit).__name__}")


def lone_surrogate(text: str) -> int | None:
    """Where `text` stops being Unicode (a character index), or None."""
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def unicode_text(text: str) -> str:
    """`text` as Unicode: halves of a character that belong together joined, lone ones replaced.

    For what an agent says, where a broken character is no reason to lose the answer.
    """
    if lone_surrogate(text) is None:
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# ----- resuming


class Verdict(StrEnum):
    """What a boot does with an open turn."""

    RESUME = "resume"
    RESUME_ALONE = "resume_alone"
    QUARANTINE = "quarantine"
    EXPIRE = "expire"


@attrs.frozen
class Judgement:
    """A verdict and its grounds, in words for whoever looks into it."""

    verdict: Verdict
    why: str


def judge(marker: Marker, interrupted_for: timedelta, rules: ResumeRules) -> Judgement:
    """What becomes of an open turn at boot. How old the *turn* is plays no part.

    Crimes before age: a turn that kills the process is put aside even when it is fresh, and one
    that would expire anyway is still shown as the killer that it is.
    """
    if marker.crashes >= rules.max_crashes:
        return Judgement(
            Verdict.QUARANTINE, f"was running at {marker.crashes} crashes of the process"
        )
    if marker.interruptions >= rules.max_interruptions:
        return Judgement(
            Verdict.QUARANTINE,
            f"was interrupted by {marker.interruptions} stops without a new step or checkpoint",
        )
    if rules.within is not None and interrupted_for > rules.within:
        return Judgement(
            Verdict.EXPIRE,
            f"was interrupted {_about(interrupted_for)} ago, resume.within is"
            f" {_about(rules.within)}",
        )
    if marker.crashes >= SUSPECT_AT:
        return Judgement(
            Verdict.RESUME_ALONE, f"was running at {marker.crashes} crashes: alone from now on"
        )
    return Judgement(Verdict.RESUME, str(marker.reason or ResumeReason.CRASH))


def _about(span: timedelta) -> str:
    return str(timedelta(seconds=round(span.total_seconds())))


# ----- beginning


def may_begin(*, door_open: bool, connected: bool, session_busy: bool, slots_free: int) -> bool:
    """Whether a turn of a session begins now. Promises 2 and 3: one at a time, none after the door
    is shut."""
    return door_open and connected and not session_busy and slots_free > 0


# ----- stopping


@attrs.frozen(kw_only=True)
class StopPlan:
    """One budget, cut into windows. All in seconds; `mark` runs first, then `grace`, and so on.

    mark + grace + unwind + flush + spare <= budget

    Equal where the grace was `clamped`; what is left otherwise is room for a slow disk.
    """

    budget: float
    mark: float
    grace: float
    unwind: float
    flush: float
    spare: float
    clamped: bool = False
    """Whether the grace that was asked for did not fit and was shortened."""


DEFAULT_BUDGET: Final = 30.0
DEFAULT_GRACE: Final = 20.0

LONGEST_BUDGET: Final = 36_500 * 86_400.0
"""The longest that a configuration can say: what is derived can be written down, too."""


def plan_stop(grace: float | None = None, budget: float | None = None) -> StopPlan:
    """Derive every deadline of a stop from one budget (promise 11).

    Neither given: 30 s and 20 s. Only the budget: two thirds of it are grace. Only the grace: a
    quarter more, and 5 s, are the budget. Both: the grace is shortened to what fits.
    """
    if budget is None:
        budget = DEFAULT_BUDGET if grace is None else min(grace * 1.25 + 5.0, LONGEST_BUDGET)
    if grace is None:
        grace = min(DEFAULT_GRACE, budget * 2 / 3)
    mark = min(2.0, budget * 0.1)
    unwind = min(2.0, budget * 0.1)
    flush = min(3.0, budget * 0.08)
    spare = min(1.0, budget * 0.05)
    room = budget - mark - unwind - flush - spare
    return StopPlan(
        budget=budget,
        mark=mark,
        grace=min(grace, room),
        unwind=unwind,
        flush=flush,
        spare=spare,
        clamped=grace > room,
    )


@attrs.frozen(kw_only=True)
class Allowance:
    """What whoever supervises a gateway is to give it. All but `burst` in whole seconds."""

    stop: int
    """From SIGTERM to SIGKILL."""
    start: int
    """Until it is ready, without any sign of progress."""
    watchdog: int
    """Without a sign of life."""
    burst: int
    """Starts within `interval` before it is given up."""
    interval: int


START_ALLOWANCE: Final = 90.0
LEAST_WATCHDOG: Final = 30.0
STARTS_A_CRASH: Final = 4
"""Starts that are allowed for each crash that convicts a turn: some turns may have to be convicted,
one after the other."""


def allow(plan: StopPlan, rules: ResumeRules) -> Allowance:
    """Derive what a supervisor is to be told from what a stop may take and what crashes mean.

    A stop gets a margin on top of its budget: a third, at least 5 s and at most 30. A loop that
    gives no sign of life for as long as a whole stop may take (at least 30 s) is dead.
    """
    margin = min(max(plan.budget / 3, 5.0), 30.0)
    burst = max(20, STARTS_A_CRASH * min(rules.max_crashes, 25))
    return Allowance(
        stop=ceil(plan.budget + margin),
        start=ceil(START_ALLOWANCE),
        watchdog=ceil(max(plan.budget, LEAST_WATCHDOG)),
        burst=burst,
        interval=15 * burst,
    )


# ----- trying again


def retry_delay(tries: int, dice: float, *, first: float = 1.0, cap: float = 300.0) -> float:
    """Seconds to wait after `tries` failures: doubling, capped, then up to a half taken off.

    `dice` is in [0, 1). The jitter keeps a thousand destinations that failed together from
    coming back together.
    """
    return min(cap, first * 2.0 ** min(tries - 1, 30)) * (1.0 - dice / 2)


@attrs.frozen(kw_only=True)
class DeliveryRules:
    """How hard a delivery is tried."""

    max_tries: int = 12
    first_delay: float = 1.0
    max_delay: float = 300.0
    timeout: float = 60.0
    """Seconds that one sending may take before its outcome counts as unknown."""


# ----- splitting

_BREAKS: Final = ("\n\n", "\n", " ")


def split_text(text: str, limit: int | None, length: Callable[[str], int] = len) -> tuple[str, ...]:
    """Cut `text` into parts of at most `limit`, measured by `length`.

    Cuts after a paragraph, else after a line, else after a word, else between two graphemes, and
    inside a grapheme only where one alone is longer than the limit. Nothing is dropped: the
    parts joined are the text.
    """
    if limit is None or length(text) <= limit:
        return (text,)
    parts: list[str] = []
    start = 0
    while start < len(text):
        end = _end_of_part(text, start, limit, length)
        parts.append(text[start:end])
        start = end
    return tuple(parts)


def _end_of_part(text: str, start: int, limit: int, length: Callable[[str], int]) -> int:
    end = _longest(text, start, limit, length)
    if end == len(text):
        return end
    window = text[start:end]
    for mark in _BREAKS:
        at = window.rfind(mark)
        # A break that leaves less than a quarter makes more parts, not better ones; and a space
        # can carry a combining mark, so that the grapheme goes on after it.
        cut = at + len(mark)
        if at >= 0 and cut * 4 >= len(window) and _ends_grapheme(text, start + cut):
            return start + cut
    return _grapheme_boundary(text, start, end)


@cache
def _grapheme() -> regex.Pattern[str]:
    # Imported when the first text has to be cut: it takes a while, and most texts are short.
    import regex

    return regex.compile(r"\X")


def _ends_grapheme(text: str, end: int) -> bool:
    match = _grapheme().match(text, end - 1)
    return match is not None and match.end() == end


def _longest(text: str, start: int, limit: int, length: Callable[[str], int]) -> int:
    """Where the longest part ends that begins at `start` and fits; at least one character.

    Costs what fits, not what is left: an agent may say a book. `length` grows with the text, so
    double what is tried until it does not fit, then halve the interval.
    """
    low, high = start + 1, start + max(limit, 1)
    if length is len:
        return min(high, len(text))
    while high < len(text) and length(text[start:high]) <= limit:
        low, high = high, high + (high - start)
    high = min(high, len(text))
    while low < high:
        middle = (low + high + 1) // 2
        if length(text[start:middle]) <= limit:
            low = middle
        else:
            high = middle - 1
    return low


def _grapheme_boundary(text: str, start: int, end: int) -> int:
    """The last boundary between graphemes after `start`, at or before `end`; `end` itself if there
    is none."""
    if text[start : end + 1].isascii():  # where only CR and LF belong together
        return end - 1 if text[end - 1 : end + 1] == "\r\n" and end - 1 > start else end
    boundary = start
    for match in _grapheme().finditer(text, start):
        if match.end() > end:
            break
        boundary = match.end()
    return boundary if boundary > start else end


# ----- names of steps


def step_name(base: str, occurrence: int) -> str:
    """A name that is the same in every attempt: the n-th use of `base` in a turn, from 1."""
    return base if occurrence == 1 else f"{base}#{occurrence}"


# ----- chat commands


class Command(StrEnum):
    """What a person can tell the gateway itself, in the chat."""

    STOP = "/stop"
    NEW = "/new"
    RETRY = "/retry"
    STATUS = "/status"
    HELP = "/help"


HELP_TEXT: Final = (
    "/stop ends the answer in progress for good\n"
    "/new starts a new conversation\n"
    "/retry tries the last message again that was not answered\n"
    "/status says what is going on here\n"
    "/help shows this"
)


def command_in(text: str) -> Command | None:
    """The chat command that `text` is, or None. A command stands alone: `/stop it` is a message."""
    if not text.startswith("/"):
        return None
    try:
        return Command(text.strip().lower())
    except ValueError:
        return None


# ----- why a turn was stopped, as the store keeps it

REPLACED: Final = "a newer message arrived"
STOPPED_BY_USER: Final = "stopped by the user"
STOPPED_BY_HOST: Final = "stopped by the host"

# ----- texts the gateway says itself; they show nothing of what went wrong inside

SORRY: Final = "Sorry, something went wrong and I could not finish this. You can try again."
SORRY_TIME: Final = "Sorry, this took too long and I stopped. You can try again."
SORRY_QUARANTINED: Final = (
    "Sorry, I could not finish this and have put it aside. Somebody can look into it."
)
SORRY_EXPIRED: Final = (
    "Sorry, I was interrupted and it is too late to go on with this. Please ask again."
)
SORRY_UNREADABLE: Final = "Sorry, this message could not be read any more. Please send it again."
STOPPING_NOTICE: Final = "I am restarting; your answer will follow."
RESUMED_NOTICE: Final = "I was interrupted, and am going on with your message now."
STOPPED_TEXT: Final = "Stopped."
NOTHING_TO_STOP: Final = "There is nothing to stop."
NEW_TEXT: Final = "A new conversation."
RETRY_TEXT: Final = "Trying again."
NOTHING_TO_RETRY: Final = "There is nothing to try again."


def in_doubt_text(name: str) -> str:
    """What the sender is told when a turn ends because an unsafe step is in doubt.

    The step's name is the agent author's own word, chosen to be shown; nothing else of the
    failure is.
    """
    return (
        f"Sorry, I was interrupted during {name!r} and cannot tell whether it happened."
        " Please check before asking again."
    )


def status_text(state: str | None, attempt: int, waiting: int) -> str:
    """The answer to /status."""
    now = "No answer is in progress." if state is None else f"Working on it (attempt {attempt})."
    return f"{now} Messages waiting: {waiting}."
