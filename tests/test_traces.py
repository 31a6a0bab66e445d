"""Traces: the shape of one message's, that a kill does not cut it, that a cancelled span says why,
that nothing said is in it, and that a collector that is gone costs nobody a moment."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from doors import open_door
from helpers import Machine, Script, msg
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from processes import PATIENCE, launch
from trio.testing import MockClock

from trio_gateway import (
    Busy,
    ConfigError,
    Delivery,
    Gateway,
    Message,
    Settings,
    Turn,
    open_gateway,
)
from trio_gateway._config import load_config
from trio_gateway._tracing import NO_SPAN, NO_TRACES, is_wanted
from trio_gateway.testing import MemoryChannel

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TRACE = int(PARENT.split("-")[1], 16)


# ----- spans in memory


@attrs.define
class Spans:
    """What ended, in memory."""

    exporter: InMemorySpanExporter = attrs.field(factory=InMemorySpanExporter)
    provider: TracerProvider = attrs.field(factory=lambda: TracerProvider(shutdown_on_exit=False))

    def __attrs_post_init__(self) -> None:
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))

    @property
    def all(self) -> tuple[ReadableSpan, ...]:
        """Everything that has ended, in that order."""
        return self.exporter.get_finished_spans()

    def of(self, name: str) -> list[ReadableSpan]:
        """The spans of that name."""
        return [span for span in self.all if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        """The one of that name."""
        (span,) = self.of(name)
        return span

    def names(self) -> list[str]:
        """Their names, sorted."""
        return sorted(span.name for span in self.all)


def about(span: ReadableSpan) -> dict[str, Any]:
    """What a span says, without the prefix."""
    return {name.removeprefix("trio_gateway."): v for name, v in (span.attributes or {}).items()}


def place(span: ReadableSpan) -> trace.SpanContext:
    """Where it is."""
    found: Any = span.get_span_context()
    assert isinstance(found, trace.SpanContext)
    return found


def trace_id(span: ReadableSpan) -> int:
    """Which trace it is part of."""
    return place(span).trace_id


def span_id(span: ReadableSpan) -> int:
    """Which span it is."""
    return place(span).span_id


def is_child(span: ReadableSpan, parent: ReadableSpan) -> bool:
    """Whether it hangs below the other one."""
    above = span.parent
    return above is not None and (above.trace_id, above.span_id) == (
        trace_id(parent),
        span_id(parent),
    )


@pytest.fixture
def spans() -> Spans:
    """Spans in memory."""
    return Spans()


@asynccontextmanager
async def boot(
    machine: Machine, spans: Spans, agent: Any, settings: Settings | None = None, **more: Any
) -> AsyncGenerator[tuple[Gateway, MemoryChannel]]:
    """A traced gateway on the machine's store, with a channel in memory."""
    channel = MemoryChannel()
    async with open_gateway(
        agent,
        store=machine.store,
        channels=[channel],
        settings=settings,
        listen=machine.log,
        clock=machine.clock,
        inline_store=True,
        tap=machine._tap,
        tracer_provider=spans.provider,
        **more,
    ) as gateway:
        await channel.wait_ready()
        yield gateway, channel


async def think(topic: str) -> str:
    await trio.sleep(1)
    return f"about {topic}"


async def test_one_message_is_one_trace_from_accept_to_delivered(
    machine: Machine, autojump_clock: MockClock, spans: Spans
) -> None:
    async def agent(turn: Turn) -> str:
        await turn.say("On it.")
        return await turn.step(think, turn.text)

    async with boot(machine, spans, agent) as (gateway, channel):
        message = attrs.evolve(channel.message("ada", "m1", "honey"), traceparent=PARENT)
        await channel.receive_all(message)
        await gateway.wait_idle()

    assert spans.names() == ["accept", "deliver", "deliver", "queue", "settle", "step", "turn"]
    assert {trace_id(span) for span in spans.all} == {TRACE}
    accept, queue, turn = spans.one("accept"), spans.one("queue"), spans.one("turn")
    assert accept.parent is not None
    assert f"{accept.parent.span_id:016x}" == PARENT.split("-")[2]
    assert is_child(queue, accept)
    assert is_child(turn, accept)
    for name in ("step", "settle", "deliver"):
        assert all(is_child(span, turn) for span in spans.of(name)), name
    assert about(turn) == {
        "turn": 1,
        "attempt": 1,
        "messages": 1,
        "channel": "memory",
        "outcome": "completed",
    }
    assert about(accept) == {"channel": "memory", "receipt": "accepted"}
    assert about(spans.one("step"))["step"] == "think"
    assert all(span.status.is_ok or span.status.is_unset for span in spans.all)


async def test_without_a_trace_a_message_begins_one(
    machine: Machine, autojump_clock: MockClock, spans: Spans
) -> None:
    async with boot(machine, spans, Script(open=True)) as (gateway, channel):
        await channel.receive("ada", "m1", "hi")
        await channel.receive("bob", "m2", "hi")
        await gateway.wait_idle()

    assert len({trace_id(span) for span in spans.all}) == 2
    assert all(span.parent is None for span in spans.of("accept"))


async def test_the_time_in_line_is_a_span(
    machine: Machine, autojump_clock: MockClock, spans: Spans
) -> None:
    agent = Script()
    async with boot(machine, spans, agent) as (gateway, channel):
        await channel.receive("ada", "m1", "hi")
        await agent.wait_begun(1)
        await channel.receive("ada", "m2", "hi")
        await trio.sleep(5)
        agent.release()
        await gateway.wait_idle()

    times = sorted((span.end_time or 0) - (span.start_time or 0) for span in spans.of("queue"))
    assert times == pytest.approx([0, 5e9], rel=0.01)


async def test_a_turn_of_several_messages_is_linked_to_their_traces(
    machine: Machine, autojump_clock: MockClock, spans: Spans
) -> None:
    agent = Script()
    async with boot(machine, spans, agent, Settings(busy=Busy.COLLECT)) as (gateway, channel):
        for n in range(3):
            await channel.receive("ada", f"m{n}", "hi")
        await agent.wait_begun(1)
        agent.release()
        await gateway.wait_idle()

    turn = next(span for span in spans.of("turn") if about(span)["messages"] == 2)
    accepted = [span_id(span) for span in spans.of("accept")]
    assert turn.parent is not None
    assert turn.parent.span_id == accepted[1]
    assert [link.context.span_id for link in turn.links] == [accepted[2]]
    assert len(spans.of("queue")) == 3


async def test_p05_a_turn_that_resumes_goes_on_in_its_trace(
    machine: Machine, autojump_clock: MockClock, spans: Spans
) -> None:
    agent = Script()
    async with boot(machine, spans, agent) as (gateway, channel):
        await channel.receive("ada", "m1", "hi")
        await agent.wait_begun(1)
        machine.crash()
        gateway.request_stop(now=True)
    before = spans.one("accept")
    spans.exporter.clear()
    await trio.sleep(60)
    agent.release()
    async with boot(machine, spans, agent) as (gateway, channel):
        await gateway.wait_idle()

    assert spans.names() == ["deliver", "queue", "settle", "turn"]
    assert {trace_id(span) for span in spans.all} == {trace_id(before)}
    turn, queue = spans.one("turn"), spans.one("queue")
    assert is_child(turn, before)
    assert (about(turn)["attempt"], about(turn)["resumed"]) == (2, "crash")
    assert (queue.end_time or 0) - (queue.start_time or 0) >= 60e9


async def test_a_reply_that_waits_is_delivered_in_its_trace_after_the_boot(
    machine: Machine, autojump_clock: MockClock, spans: Spans
) -> None:
    async def fail(delivery: Delivery) -> None:
        raise OSError("unplugged")

    async with boot(machine, spans, Script(open=True)) as (gateway, channel):
        channel.before_send = fail
        await channel.receive("ada", "m1", "hi")
        await trio.sleep(0.1)
    turn, first = spans.one("turn"), spans.of("deliver")[0]
    spans.exporter.clear()
    async with boot(machine, spans, Script(open=True)) as (gateway, channel):
        (delivery,) = await channel.wait_sent(1)
        await gateway.wait_idle()

    again = spans.of("deliver")[-1]
    assert is_child(first, turn)
    assert is_child(again, turn)
    assert (first.status.is_ok, about(first)["error.type"]) == (False, "OSError")
    assert about(again)["try"] > about(first)["try"]
    assert f"{trace_id(again):032x}" in (delivery.traceparent or "")


async def test_a_step_that_is_remembered_says_so(
    machine: Machine, autojump_clock: MockClock, spans: Spans
) -> None:
    stay = True

    async def agent(turn: Turn) -> str:
        found = await turn.step(think, "x")
        if stay:
            await trio.sleep_forever()
        return found

    async with boot(machine, spans, agent) as (gateway, channel):
        await channel.receive("ada", "m1", "hi")
        await trio.sleep(2)
        gateway.request_stop(now=True)
    stay = False
    async with boot(machine, spans, agent) as (gateway, _):
        await gateway.wait_idle()

    done, known = spans.of("step")
    assert ("remembered" in about(done), about(known)["remembered"]) == (False, True)
    assert trace_id(done) == trace_id(known)


# ----- a cancelled span says why


async def forever() -> str:
    await trio.sleep_forever()
    raise AssertionError


async def in_a_step(turn: Turn) -> str:
    return await turn.step(forever)


async def _stop(gateway: Gateway, channel: MemoryChannel) -> None:
    gateway.request_stop(now=True)


async def _say_stop(gateway: Gateway, channel: MemoryChannel) -> None:
    await channel.receive("ada", "m2", "/stop")


async def _interrupt(gateway: Gateway, channel: MemoryChannel) -> None:
    await channel.receive("ada", "m2", "and now?")
    await trio.sleep(1)
    await gateway.stop_turn(msg("ada", "m", channel="memory").key)


async def _wait(gateway: Gateway, channel: MemoryChannel) -> None:
    await trio.sleep(100)


@pytest.mark.parametrize(
    ("why", "settings", "act"),
    [
        ("shutdown", Settings(), _stop),
        ("stop_command", Settings(), _say_stop),
        ("superseded", Settings(busy=Busy.INTERRUPT), _interrupt),
        ("time_limit", Settings(time_limit=50), _wait),
    ],
)
async def test_what_is_cancelled_says_why(
    machine: Machine,
    autojump_clock: MockClock,
    spans: Spans,
    why: str,
    settings: Settings,
    act: Any,
) -> None:
    async with boot(machine, spans, in_a_step, settings) as (gateway, channel):
        await channel.receive("ada", "m1", "hi")
        await trio.sleep(1)
        await act(gateway, channel)
        await trio.sleep(1)

    for name in ("turn", "step"):
        span = spans.of(name)[0]
        assert about(span)["cancelled"] == why, name
        assert span.status.status_code is trace.StatusCode.ERROR
        assert span.status.description == f"cancelled: {why}"


async def test_a_restart_is_told_from_a_shutdown(
    machine: Machine, autojump_clock: MockClock, spans: Spans
) -> None:
    async def agent(turn: Turn) -> str:
        if turn.session.name == "restarts":
            turn.request_restart()
            return "restarting"
        return await forever()

    async with boot(machine, spans, agent, Settings(grace=1)) as (gateway, channel):
        await channel.receive("ada", "m1", "hi")
        await channel.receive("restarts", "m2", "hi")
        await gateway.wait_stop_requested()

    cancelled = [about(span).get("cancelled") for span in spans.of("turn")]
    assert sorted(map(str, cancelled)) == ["None", "restart"]


async def test_an_agents_own_deadline_is_the_agents(
    machine: Machine, autojump_clock: MockClock, spans: Spans
) -> None:
    async def agent(turn: Turn) -> str:
        with trio.move_on_after(3):
            await turn.step(forever)
        return "gave up"

    async with boot(machine, spans, agent) as (gateway, channel):
        await channel.receive("ada", "m1", "hi")
        await gateway.wait_idle()

    assert about(spans.one("step"))["cancelled"] == "agent"
    assert about(spans.one("turn"))["outcome"] == "completed"


async def test_a_refused_message_has_a_span_that_says_so(
    machine: Machine, autojump_clock: MockClock, spans: Spans
) -> None:
    async def nobody(message: Message) -> bool:
        return False

    async with boot(machine, spans, Script(), authorize=nobody) as (_, channel):
        await channel.receive("ada", "m1", "hi")

    assert about(spans.one("accept")) == {
        "channel": "memory",
        "receipt": "refused",
        "refusal": "not_allowed",
    }


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("given", ["nonsense", "00-" + "0" * 32 + "-" + "1" * 16 + "-01", 7])
async def test_p14_a_trace_that_is_none_is_refused_by_name(
    machine: Machine, autojump_clock: MockClock, traced: bool, given: Any
) -> None:
    provider = Spans().provider if traced else None
    async with open_gateway(
        Script(), store=machine.store, inline_store=True, tracer_provider=provider
    ) as gateway:
        receipt = await gateway.accept(attrs.evolve(msg("ada", "m1"), traceparent=given))

    assert receipt.reason is not None
    assert receipt.reason.startswith("traceparent: expected a W3C trace context")


# ----- what is in them, and what is not


async def test_nothing_that_was_said_or_named_is_in_a_span(
    machine: Machine, autojump_clock: MockClock, spans: Spans
) -> None:
    async def agent(turn: Turn) -> str:
        await turn.say("secret-said")
        await turn.step(think, "secret-argument")
        turn.progress("secret-progress")
        raise RuntimeError("secret-error")

    async with boot(machine, spans, agent) as (gateway, channel):
        await channel.receive("secret-session", "secret-id", "secret-text", "secret-sender")
        await gateway.wait_idle()

    assert len(spans.all) >= 6
    assert "secret" not in "".join(span.to_json() for span in spans.all)
    turn = spans.one("turn")
    assert about(turn)["error.type"] == "RuntimeError"
    assert about(turn)["outcome"] == "failed"


async def test_an_agents_own_spans_nest_below_its_turn_and_its_steps(
    tmp_path: Path, spans: Spans
) -> None:
    tracer = spans.provider.get_tracer("the agent's own")

    async def call() -> str:
        with tracer.start_as_current_span("model"):
            return "said"

    def plain() -> str:
        with tracer.start_as_current_span("in a thread"):
            return "done"

    async def agent(turn: Turn) -> str:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
        await turn.step(call)
        await trio.to_thread.run_sync(plain)
        return "done"

    async with open_gateway(
        agent, store=tmp_path / "g.db", tracer_provider=spans.provider
    ) as gateway:
        await gateway.ask(msg("ada", "m1"))

    turn, step = spans.one("turn"), spans.one("step")
    beside, within = sorted(spans.of("model"), key=lambda span: is_child(span, step))
    assert is_child(beside, turn)
    assert is_child(within, step)
    assert is_child(spans.one("in a thread"), turn)


async def test_no_turn_is_in_the_context_of_the_one_before(
    machine: Machine, autojump_clock: MockClock, spans: Spans
) -> None:
    """The turn that settles hands its slot on: the next one must not find its span current."""
    found: list[int] = []

    async def agent(turn: Turn) -> str:
        found.append(trace.get_current_span().get_span_context().trace_id)
        await trio.sleep(1)
        return "done"

    async with boot(machine, spans, agent) as (gateway, channel):
        for n in range(4):
            await channel.receive("ada", f"m{n}", "hi")
        await gateway.wait_idle()

    assert len(set(found)) == 4
    assert set(found) == {trace_id(span) for span in spans.of("turn")}


async def test_untraced_nothing_is_done(tmp_path: Path) -> None:
    async def agent(turn: Turn) -> str:
        return str(trace.get_current_span().get_span_context().is_valid)

    async with open_gateway(agent, store=tmp_path / "g.db") as gateway:
        message = attrs.evolve(msg("ada", "m1"), traceparent=PARENT)
        (reply,) = await gateway.ask(message)

    assert reply.text == "False"
    assert NO_TRACES.settle() is NO_SPAN


# ----- over HTTP


async def test_a_header_becomes_the_parent_and_one_that_is_none_is_none(tmp_path: Path) -> None:
    spans = Spans()
    async with open_door(tmp_path, Script(open=True), tracer_provider=spans.provider) as door:
        for n, given in enumerate((PARENT, "nonsense")):
            headers = {"traceparent": given, "prefer": "wait=10"}
            answer = await door.post(f"s{n}", "hi", headers=headers)
            assert answer.status_code == 200
        chat = {"model": "agent", "messages": [{"role": "user", "content": "hi"}]}
        answer = await door.client.post(
            "/v1/chat/completions", json=chat, headers={"traceparent": PARENT}
        )
        assert answer.status_code == 200

    with_parent, without, openai = spans.of("accept")
    assert trace_id(with_parent) == trace_id(openai) == TRACE
    assert without.parent is None
    assert sum(trace_id(span) == TRACE for span in spans.of("turn")) == 2


# ----- a collector, and a real process


class Collector(ThreadingHTTPServer):
    """An OTLP receiver on loopback. `spans` has what came, decoded, with its resource."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Receiver)
        self.news = threading.Condition()
        self.spans: list[tuple[dict[str, str], Any]] = []
        self.headers: list[dict[str, str]] = []

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def take(self, path: str, headers: dict[str, str], body: bytes) -> None:
        """One request."""
        assert path == "/v1/traces"
        request = ExportTraceServiceRequest.FromString(body)
        with self.news:
            self.headers.append(headers)
            for group in request.resource_spans:
                named = {one.key: one.value.string_value for one in group.resource.attributes}
                for scope in group.scope_spans:
                    self.spans += [(named, span) for span in scope.spans]
            self.news.notify_all()

    def wait_for(self, name: str, count: int = 1) -> list[Any]:
        """Wait until `count` spans of that name have come."""
        deadline = time.monotonic() + PATIENCE
        with self.news:
            while len(found := [span for _, span in self.spans if span.name == name]) < count:
                left = deadline - time.monotonic()
                assert left > 0, f"no {count} {name}: {[s.name for _, s in self.spans]}"
                self.news.wait(left)
        return found


class _Receiver(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Collector)
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.take(self.path, dict(self.headers.items()), body)
        answer = ExportTraceServiceResponse().SerializeToString()
        self.send_response(200)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A collector that listens."""
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join(PATIENCE)


def environ(**more: str) -> dict[str, str]:
    """The environment of a traced process: nobody's proxies, and batches that leave soon."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    return clean | {"OTEL_BSP_SCHEDULE_DELAY": "100", "NO_PROXY": "*"} | more


def attributes(span: Any) -> dict[str, Any]:
    """What a decoded span says."""
    return {
        one.key.removeprefix("trio_gateway."): one.value.string_value or one.value.int_value
        for one in span.attributes
    }


AGENT = """
import trio
from opentelemetry import trace

async def agent(turn):
    turn.progress("begun")
    with trace.get_tracer("mine").start_as_current_span("my own"):
        await trio.sleep(0 if turn.resumed else 60)
    return "done"
"""


def test_p05_a_kill_does_not_cut_the_trace(memory_path: Path, collector: Collector) -> None:
    env = environ(TRIO_GATEWAY_TRACES__ENDPOINT=collector.url)
    with launch(memory_path, AGENT, env=env) as gateway:
        gateway.send("ada", "m1", "hello")
        gateway.expect("progress", text="begun")
        (accept,) = collector.wait_for("accept")
        gateway.kill()
    assert not [span for _, span in collector.spans if span.name == "turn"]

    with launch(memory_path, AGENT, env=env) as gateway:
        gateway.expect("reply", text="done")
        assert gateway.stop() == 0

    (turn,) = collector.wait_for("turn")
    (own,) = collector.wait_for("my own")
    (deliver,) = [s for s in collector.wait_for("deliver") if attributes(s)["kind"] == "answer"]
    assert {turn.trace_id, own.trace_id, deliver.trace_id} == {accept.trace_id}
    assert turn.parent_span_id == accept.span_id
    assert (own.parent_span_id, deliver.parent_span_id) == (turn.span_id, turn.span_id)
    assert (attributes(turn)["attempt"], attributes(turn)["resumed"]) == (2, "crash")
    assert {named["service.name"] for named, _ in collector.spans} == {"trio-gateway"}


def test_a_stop_sends_what_there_is_and_says_why_a_turn_was_cut(
    memory_path: Path, collector: Collector
) -> None:
    """With batches that would not leave by themselves before the end."""
    env = environ(TRIO_GATEWAY_TRACES__ENDPOINT=collector.url, OTEL_BSP_SCHEDULE_DELAY="60000")
    with launch(memory_path, AGENT, env=env, grace=0.2) as gateway:
        gateway.send("ada", "m1", "hello")
        gateway.expect("progress", text="begun")
        assert gateway.stop() == 0

    (turn,) = collector.wait_for("turn")
    assert attributes(turn)["cancelled"] == "shutdown"
    assert turn.status.message == "cancelled: shutdown"


def test_the_environment_of_opentelemetry_is_enough(
    memory_path: Path, collector: Collector
) -> None:
    env = environ(
        OTEL_EXPORTER_OTLP_ENDPOINT=collector.url,
        OTEL_EXPORTER_OTLP_HEADERS="x-key=opensesame",
        OTEL_SERVICE_NAME="my-bot",
        OTEL_RESOURCE_ATTRIBUTES="deployment.environment=test",
    )
    with launch(memory_path, AGENT.replace("60", "0"), env=env) as gateway:
        gateway.send("ada", "m1", "hello")
        gateway.expect("reply", text="done")
        assert gateway.stop() == 0

    collector.wait_for("turn")
    named, _ = collector.spans[0]
    assert (named["service.name"], named["deployment.environment"]) == ("my-bot", "test")
    assert collector.headers[0]["x-key"] == "opensesame"
    assert "opensesame" not in gateway.stderr


@contextmanager
def hole() -> Generator[str]:
    """An address that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=16) as sock:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"


def test_p11_a_collector_that_never_answers_holds_nobody_up(memory_path: Path) -> None:
    with hole() as url:
        env = environ(TRIO_GATEWAY_TRACES__ENDPOINT=url)
        with launch(memory_path, AGENT.replace("60", "0"), env=env, grace=3, budget=6) as gateway:
            for n in range(20):
                gateway.send(f"s{n}", f"m{n}", "hello")
            for _ in range(20):
                gateway.expect("reply", text="done")
            began = time.monotonic()
            assert gateway.stop() == 0
            # The library's own waits are 10 s for an export, and 30 s for the end.
            assert time.monotonic() - began < 9


def test_a_collector_that_is_gone_is_told_once_in_the_log(memory_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    env = environ(TRIO_GATEWAY_TRACES__ENDPOINT=url)
    with launch(memory_path, AGENT.replace("60", "0"), env=env) as gateway:
        gateway.send("ada", "m1", "hello")
        gateway.expect("reply", text="done")
        told = gateway.expect_log("traces")
        assert gateway.stop() == 0

    assert told["level"] == "warning"
    assert all(line.startswith("{") for line in gateway.stderr.splitlines())


# ----- when they are on, and without the libraries


@pytest.mark.parametrize(
    ("endpoint", "variables", "wanted"),
    [
        (None, {}, False),
        ("http://c:4318", {}, True),
        ("http://c:4318", {"OTEL_SDK_DISABLED": "true"}, False),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, True),
        (None, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}, True),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        (
            None,
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_TRACES_EXPORTER": "none"},
            False,
        ),
    ],
)
def test_when_traces_are_on(endpoint: str | None, variables: dict[str, str], wanted: bool) -> None:
    assert is_wanted(endpoint, variables) is wanted


@pytest.mark.parametrize(
    "given", ["c:4318", "ftp://c", "http://", "http://c:x", "http://a:b@c:4318", "\n", ""]
)
def test_p14_an_endpoint_that_is_none_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"TRIO_GATEWAY_TRACES__ENDPOINT": given})

    (line,) = str(caught.value).splitlines()
    assert line.startswith("traces.endpoint: expected a URL like")


BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("opentelemetry"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
for name in [one for one in sys.modules if one.startswith("opentelemetry")]:
    del sys.modules[name]

async def agent(turn):
    return turn.text
"""


def test_p14_without_the_extra_a_configured_endpoint_is_one_clear_error(
    memory_path: Path,
) -> None:
    env = environ(TRIO_GATEWAY_TRACES__ENDPOINT="http://127.0.0.1:9")
    with launch(memory_path, BLOCKED, env=env, ready=False) as gateway:
        assert gateway.wait() == 78

    assert gateway.stderr.count("\n") == 1
    assert 'which is not installed: pip install "trio-gateway[otel]"' in gateway.stderr


def test_without_the_extra_the_environment_alone_stops_nobody(memory_path: Path) -> None:
    env = environ(OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9")
    with launch(memory_path, BLOCKED, env=env) as gateway:
        told = gateway.expect_log("traces")
        gateway.send("ada", "m1", "hello")
        gateway.expect("reply", text="hello")
        assert gateway.stop() == 0

    assert 'pip install "trio-gateway[otel]"' in told["message"]
