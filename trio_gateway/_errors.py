"""Few errors. Each names the party at fault and the next step."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from json import JSONDecodeError
from typing import Final, cast

LONGEST: Final = 1000
"""Characters of somebody else's words that are kept in an error, a log line or a row."""


class GatewayError(Exception):
    """Every error that trio_gateway raises on purpose."""


class InvalidInput(GatewayError, ValueError):
    """The caller handed in something that cannot be accepted. Nothing was changed."""


class ConfigError(GatewayError):
    """The configuration cannot be used. A restart will not help: exit code 78."""


@contextmanager
def needs_extra(extra: str, what: str) -> Generator[None, None, None]:
    """Around the imports of an optional part: what is not installed is one clear error."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("trio_gateway"):
            raise
        raise ConfigError(
            f"{what} needs {error.name}, which is not installed:"
            f' pip install "trio-gateway[{extra}]"'
        ) from error


class AgentNotUsable(GatewayError):
    """The object given as an agent is not one."""


class Refused(GatewayError):
    """`ask` handed in a message that the inbox refused; the text is the reason."""


class GatewayStopping(GatewayError):
    """The gateway stops before this can be done. What was accepted is kept for the next boot."""


class AgentMisuse(GatewayError):
    """The agent used its `Turn` in a way that has no meaning."""


class StepNotStorable(AgentMisuse, TypeError):
    """A step or checkpoint returned what cannot be stored and read back."""


class StepInDoubt(GatewayError):
    """An unsafe step was cut in the middle by an earlier attempt: it may or may not have happened.

    `name` is the step's name. Find out from the outside world what happened, then go on; left
    unhandled, it ends the turn FAILED with a message that names the step.
    """

    def __init__(self, name: str) -> None:
        super().__init__(
            f"step {name!r} was cut in the middle by an earlier attempt: it may or may not have"
            " happened. Look outside before doing it again."
        )
        self.name = name

    def __reduce__(self) -> tuple[type[StepInDoubt], tuple[str]]:
        return (type(self), (self.name,))


# ----- the channel's side


class DeliveryError(GatewayError):
    """What a channel raises from `send`. Any other exception means: outcome unknown, try again."""


class RetryLater(DeliveryError):
    """The platform did not take the text and says when to come back (`after`, in seconds)."""

    def __init__(self, after: float, why: str = "the platform asks to wait") -> None:
        super().__init__(f"{why} ({after:g} s)")
        self.after = after


class Undeliverable(DeliveryError):
    """The text will never arrive (blocked, gone): a dead letter, where a person can see it."""


class ChannelEnded(GatewayError):
    """The other end of a channel has gone for good (a closed stdout): the gateway should stop."""


# ----- the store's side


class StoreError(GatewayError):
    """The store could not do it. `retryable` says whether the same call may work later."""

    retryable = False


class StoreFull(StoreError):
    """No room on the disk."""

    retryable = True


class StoreIOError(StoreError):
    """The disk failed. A commit that failed this way may be durable all the same: read first."""

    retryable = True


class StoreBusy(StoreError):
    """Another process holds a lock inside the database for too long."""

    retryable = True


class StoreCorrupt(StoreError):
    """The file is not a readable database. It was not changed."""


class StoreInUse(StoreError):
    """Another gateway has this store open; `pid` is the holder's, where it is known."""

    def __init__(self, message: str, pid: int | None) -> None:
        super().__init__(message)
        self.pid = pid


class StoreSchemaError(StoreError):
    """The store was written by a version that this one cannot read. It was not changed."""


class StoreClosed(StoreError):
    """The store was closed before this was asked."""


class NotFound(GatewayError, LookupError):
    """Nothing in the store goes by that name."""


def parted(
    error: BaseException | None, kind: type[BaseException]
) -> tuple[BaseException | None, BaseException | None]:
    """What in an error is of a kind, and the rest; also where it comes out of a nursery."""
    if isinstance(error, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", error)
        return group.split(kind)
    return (error, None) if isinstance(error, kind) else (None, error)


def unwrap(error: BaseException) -> BaseException:
    """What is alone inside groups of one; a group of several as it is."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    group = cast("BaseExceptionGroup[BaseException]", error)
    inside = group.exceptions
    return unwrap(inside[0]) if len(inside) == 1 else group


def shown(value: object) -> str:
    """`repr(value)`, whatever it is: never fails, is never long, and has a place in UTF-8."""
    try:
        return _bounded(repr(value))
    except Exception:
        return f"<{type(value).__name__} that cannot be shown>"


def words_of(error: BaseException) -> str:
    """What an error says, under the same conditions; what it is, where it says nothing."""
    try:
        return _bounded(str(error)) or type(error).__name__
    except Exception:
        return type(error).__name__


def _bounded(text: str) -> str:
    whole = text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
    return whole.encode("utf-8", "backslashreplace").decode()


def lone_cause(error: BaseException) -> str:
    """The first line of what went wrong, without the groups around it."""
    while isinstance(error, BaseExceptionGroup):
        error = cast("tuple[BaseException, ...]", error.exceptions)[0]
    return (words_of(error).splitlines() or [type(error).__name__])[0]


def unless_for_want_of_memory(error: BaseException) -> None:
    """Raise `MemoryError` if that is all that an error of reading tells: what parsers and
    validators make of it looks like damage, and what seems to be damaged is given up for good."""
    if isinstance(error, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", error)
        for inner in group.exceptions:
            unless_for_want_of_memory(inner)
    elif isinstance(error, MemoryError) or (
        isinstance(error, JSONDecodeError) and error.msg.startswith("Not enough memory")
    ):
        raise MemoryError(lone_cause(error)) from error


# Control characters, the separators that some readers take for line ends, what turns the
# direction of writing around, and what is no Unicode at all.
_UNSAFE: Final = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_SHORT_ESCAPES: Final = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def escape(text: str) -> str:
    """`text` on one line, with nothing in it that a terminal or a reader of lines obeys."""
    return _UNSAFE.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return _SHORT_ESCAPES.get(match[0]) or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")
