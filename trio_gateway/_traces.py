"""Traces for OpenTelemetry: the spans of the flow, and a way out for them.

Spans have no text, no name of a session, no id that a stranger chose: a collector is often somebody
else's. What ends a span early is told by its status and by `trio_gateway.cancelled`.

What leaves the process is a batch, from a thread of the library's own: a collector that is gone
costs spans, and no turn a moment.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from contextvars import Token
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final, Protocol, cast
from urllib.parse import urlsplit

import attrs
import trio
from opentelemetry import context as contexts
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from ._errors import ConfigError, needs_extra, parted, unwrap, words_of
from ._messages import Delivery, Message, Receipt, is_channel_name, is_traceparent
from ._tracing import Accepting, Span, Tracer, TracerProvider
from .store import OpenTurn

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider as SdkProvider

NAME: Final = "trio_gateway"

TOLD_EVERY: Final = 60.0
"""Seconds between two complaints that are told: a collector that is gone has many."""


# ----- contexts, as text and back


def traceparent_of(found: SpanContext) -> str | None:
    """A span's context as W3C writes it; None for one that is none."""
    if not found.is_valid:
        return None
    return f"00-{found.trace_id:032x}-{found.span_id:016x}-{int(found.trace_flags) & 1:02x}"


def span_context_of(traceparent: str | None) -> SpanContext | None:
    """The same, read back."""
    if not is_traceparent(traceparent):
        return None
    _, trace_id, span_id, flags = cast("str", traceparent).split("-")
    return SpanContext(
        int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=TraceFlags(int(flags, 16))
    )


def _context(traceparent: str | None) -> Context:
    """What a span goes on from: never from what happens to be current."""
    found = span_context_of(traceparent)
    if found is None:
        return Context()
    return trace.set_span_in_context(trace.NonRecordingSpan(found), Context())


# ----- spans


class OtelSpan(Span):
    """A span of OpenTelemetry; `current`: it is the task's, until it ends."""

    def __init__(self, span: trace.Span, *, current: bool = False) -> None:
        self._span = span
        self._said = False
        self._token: Token[Context] | None = None
        if current:
            self._token = contexts.attach(trace.set_span_in_context(span))
        self.traceparent = traceparent_of(span.get_span_context())

    def __enter__(self) -> OtelSpan:
        return self

    def __exit__(self, kind: object, error: BaseException | None, where: object, /) -> None:
        if error is not None:
            cancelled, failed = parted(error, trio.Cancelled)
            if failed is not None:
                self.failed(type(unwrap(failed)).__name__)
            elif cancelled is not None:
                self.cancelled("agent")
        self.end()

    def note(self, name: str, value: str | int | bool) -> None:
        self._span.set_attribute(f"{NAME}.{name}", value)

    def link(self, traceparent: str | None) -> None:
        found = span_context_of(traceparent)
        if found is not None:
            self._span.add_link(found)

    def failed(self, kind: str) -> None:
        self._say("error.type", kind, kind)

    def cancelled(self, reason: str) -> None:
        self._say(f"{NAME}.cancelled", reason, f"cancelled: {reason}")

    def _say(self, name: str, value: str, status: str) -> None:
        if not self._said:
            self._said = True
            self._span.set_attribute(name, value)
            self._span.set_status(Status(StatusCode.ERROR, status))

    def end(self) -> None:
        if self._token is not None:
            token, self._token = self._token, None
            contexts.detach(token)
        self._span.end()


class OtelAccepting(Accepting):
    """One span for each message."""

    def __init__(self, tracer: OtelTracer, messages: Sequence[Message]) -> None:
        self._spans = [tracer.accept(message) for message in messages]
        super().__init__(
            [_carrying(message, span) for message, span in zip(messages, self._spans, strict=True)]
        )

    def answered(self, receipts: Sequence[Receipt]) -> None:
        for span, receipt in zip(self._spans, receipts, strict=True):
            span.note("receipt", receipt.status.value)
            if receipt.refusal is not None:
                span.note("refusal", receipt.refusal.value)

    def __exit__(self, kind: object, error: BaseException | None, where: object, /) -> None:
        for span in self._spans:
            if error is not None and parted(error, trio.Cancelled)[0] is not None:
                span.cancelled("caller")
            span.__exit__(kind, error, where)


def _carrying(message: Message, span: OtelSpan) -> Message:
    if message.traceparent is not None and not is_traceparent(message.traceparent):
        return message  # the inbox says what is wrong with it
    return attrs.evolve(message, traceparent=span.traceparent)


class OtelTracer(Tracer):
    """The flow's spans, by a provider of OpenTelemetry."""

    on = True

    def __init__(self, provider: TracerProvider) -> None:
        self._tracer = cast("trace.Tracer", provider.get_tracer(NAME))

    def accept(self, message: Message) -> OtelSpan:
        """The span of one message at the inbox; it goes on in the trace of whoever sent it."""
        span = self._tracer.start_span("accept", _context(message.traceparent), SpanKind.CONSUMER)
        if is_channel_name(message.channel):
            span.set_attribute(f"{NAME}.channel", message.channel)
        return OtelSpan(span)

    def accepting(self, messages: Sequence[Message]) -> Accepting:
        return OtelAccepting(self, messages)

    def turn(self, turn: OpenTurn) -> Span:
        """In the trace of the message that has waited longest; linked to those of the others."""
        first, *others = [message.traceparent for message in turn.messages] or [None]
        about = _about(turn)
        self._queued(turn, about)
        linked = [found for one in others if (found := span_context_of(one)) is not None]
        span = self._tracer.start_span(
            "turn",
            _context(first),
            attributes=about,
            links=[Link(found) for found in linked],
            start_time=turn.began_at * 1000 or None,
        )
        return OtelSpan(span, current=True)

    def _queued(self, turn: OpenTurn, about: Mapping[str, Any]) -> None:
        """What is over: the time in line, of each message; for a turn that resumes, the time since
        it was interrupted."""
        end = turn.began_at * 1000
        since = list(turn.accepted_at)
        if turn.resumed is not None:
            since = [int(turn.resumed.at.timestamp() * 1_000_000)] * len(since)
        for message, at in zip(turn.messages, since, strict=False):
            span = self._tracer.start_span(
                "queue",
                _context(message.traceparent),
                attributes=about,
                start_time=min(at * 1000, end),
            )
            span.end(end)

    def step(self, name: str, *, remembered: bool) -> Span:
        span = self._tracer.start_span("step", attributes={f"{NAME}.step": name})
        if remembered:
            span.set_attribute(f"{NAME}.remembered", True)
        return OtelSpan(span, current=True)

    def settle(self) -> Span:
        return OtelSpan(self._tracer.start_span("settle"), current=True)

    def deliver(self, delivery: Delivery) -> Span:
        about: dict[str, str | int | bool] = {
            f"{NAME}.channel": delivery.session.channel,
            f"{NAME}.kind": delivery.kind.value,
            f"{NAME}.try": delivery.tries + 1,
            f"{NAME}.repeat": delivery.repeat,
        }
        if delivery.turn is not None:
            about[f"{NAME}.turn"] = delivery.turn
        span = self._tracer.start_span(
            "deliver", _context(delivery.traceparent), SpanKind.PRODUCER, attributes=about
        )
        return OtelSpan(span, current=True)


def _about(turn: OpenTurn) -> dict[str, str | int]:
    about: dict[str, str | int] = {
        f"{NAME}.turn": turn.id,
        f"{NAME}.attempt": turn.attempt,
        f"{NAME}.messages": len(turn.messages),
        f"{NAME}.channel": turn.session.channel,
    }
    if turn.resumed is not None:
        about[f"{NAME}.resumed"] = turn.resumed.reason.value
    return about


# ----- the way out, for `trio-gateway run`


class Says(Protocol):
    """Where complaints go. Must not wait."""

    def say(self, level: str, event: str, **fields: object) -> None:
        """Tell something."""
        ...


class Export:
    """Sends spans to a collector. Made by `open_export`."""

    def __init__(self, provider: SdkProvider, complaints: logging.Handler) -> None:
        self.provider = provider
        self._complaints = complaints

    def close(self, timeout: float) -> None:
        """Send what there is, for at most `timeout` seconds; what a collector did not take by then
        is lost."""
        # In a thread that nobody waits for at the end: the library's own waits have other bounds.
        leaving = threading.Thread(target=self.provider.shutdown, name="traces", daemon=True)
        try:
            leaving.start()
        except (RuntimeError, MemoryError):
            return  # no room for a thread: the spans are lost, and the exit is not
        leaving.join(max(timeout, 0.0))


def open_export(endpoint: str | None, environ: Mapping[str, str], log: Says) -> Export:
    """A provider that sends to `endpoint`, or to where OTEL_* says. It becomes the process's own,
    unless the agent has one already, so that spans of the agent leave by it, too.

    Raises `ConfigError` for values of OTEL_* that mean nothing, and without the extra `otel`.
    """
    with needs_extra("otel", "[traces]"):
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider as Provider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    complaints = _Complaints(log)
    try:
        # Not at the exit of Python: the stop has a budget, and that would wait beyond it.
        provider = Provider(resource=Resource.create(_names(environ)), shutdown_on_exit=False)
        exporter = OTLPSpanExporter(None if endpoint is None else _whole(endpoint))
        provider.add_span_processor(BatchSpanProcessor(exporter))
    except ValueError as error:
        raise ConfigError(f"traces: a variable OTEL_… means nothing: {words_of(error)}") from error
    if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        trace.set_tracer_provider(provider)
    return Export(provider, complaints)


def _names(environ: Mapping[str, str]) -> dict[str, str]:
    """How the process calls itself, unless somebody has named it."""
    named = "service.name=" in environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    told = {} if named or environ.get("OTEL_SERVICE_NAME") else {"service.name": "trio-gateway"}
    return {**told, "trio_gateway.version": version("trio-gateway")}


def _whole(endpoint: str) -> str:
    """A collector's address, with the path of traces where none is given."""
    return endpoint if urlsplit(endpoint).path.strip("/") else f"{endpoint.rstrip('/')}/v1/traces"


class _Complaints(logging.Handler):
    """Tells what the library complains of in our log, now and then. Left to itself, the library
    writes to standard error, which may wait, on the thread of the event loop."""

    def __init__(self, log: Says) -> None:
        super().__init__(logging.WARNING)
        self._log = log
        self._told: dict[str, float] = {}
        root = logging.getLogger("opentelemetry")
        root.addHandler(self)
        root.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        now = time.monotonic()
        if now - self._told.get(record.msg, -TOLD_EVERY) < TOLD_EVERY:
            return
        self._told[record.msg] = now
        self._log.say("warning", "traces", message=record.getMessage())
