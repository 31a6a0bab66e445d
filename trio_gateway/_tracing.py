"""Where the flow tells what it does, and for how long. Nobody listens here; `_traces` is for
OpenTelemetry.

    accept ----------.                         in the trace of whoever sent the message
      |-- queue      |
      |-- turn       |  attempt 1              cut by a kill: its span is lost, its trace is not
      |-- turn       |  attempt 2, in another process
      |     |-- step, step
      |     |-- settle
      |     '-- deliver

The trace goes with the message into its row, in the transaction that accepts it, and with what is
said into the outbox.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final, Protocol

from ._messages import Delivery, Message, Receipt
from .store import OpenTurn


class TracerProvider(Protocol):
    """What OpenTelemetry calls a tracer provider, as far as it is used."""

    def get_tracer(self, instrumenting_module_name: str, /) -> Any:
        """A tracer."""
        ...


class Span:
    """A piece of work. As a context manager it ends with the block; what the block raises, it says.
    What was said first of how it went counts."""

    traceparent: str | None = None
    """Where it is, for what goes on in another process (W3C)."""

    def __enter__(self) -> Span:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object, /) -> None:
        return None

    def note(self, name: str, value: str | int | bool) -> None:
        """Say something about it: never a text, never a secret."""

    def link(self, traceparent: str | None) -> None:
        """It is about something in another trace, too."""

    def failed(self, kind: str) -> None:
        """It failed, for an error of that kind."""

    def cancelled(self, reason: str) -> None:
        """It was cancelled, and why."""

    def end(self) -> None:
        """It has ended."""


class Accepting(AbstractContextManager["Accepting", None]):
    """Messages at the inbox: one span each. `messages` know their traces."""

    def __init__(self, messages: Sequence[Message]) -> None:
        self.messages: Sequence[Message] = messages

    def __exit__(self, kind: object, error: BaseException | None, trace: object, /) -> None:
        return None

    def answered(self, receipts: Sequence[Receipt]) -> None:
        """What became of them, in the same order."""


class Tracer:
    """Traces nothing, and costs next to nothing."""

    on: bool = False

    def accepting(self, messages: Sequence[Message]) -> Accepting:
        """Messages have arrived."""
        return Accepting(messages)

    def turn(self, turn: OpenTurn) -> Span:
        """An attempt begins: what it waited for is over. Its span is the current one of the task
        that calls, and of all that the task starts."""
        return NO_SPAN

    def step(self, name: str, *, remembered: bool) -> Span:
        """A step of the current turn begins."""
        return NO_SPAN

    def settle(self) -> Span:
        """The current turn is being settled."""
        return NO_SPAN

    def deliver(self, delivery: Delivery) -> Span:
        """A delivery is tried."""
        return NO_SPAN


NO_SPAN: Final = Span()
NO_TRACES: Final = Tracer()


def is_wanted(endpoint: str | None, environ: Mapping[str, str]) -> bool:
    """Whether traces are on: by an endpoint in the configuration, or by those of OpenTelemetry."""
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    if endpoint is not None:
        return True
    exporters = environ.get("OTEL_TRACES_EXPORTER", "otlp").split(",")
    return "otlp" in [one.strip() for one in exporters] and any(
        environ.get(name)
        for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    )
