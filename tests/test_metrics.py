"""The metrics: each moves when it should, none has a label that a stranger chooses, the page and
the alert rules name what there is, and a scrape has a bound."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import apsw
import attrs
import pytest
import trio
import yaml
from doors import TOKEN, open_door
from helpers import PATIENCE, Machine, Script, msg
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as read_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_gateway import (
    Delivery,
    DeliveryRules,
    Event,
    Gateway,
    Limits,
    Message,
    ResumeRules,
    Settings,
    StoreFull,
    Turn,
    Undeliverable,
    open_gateway,
)
from trio_gateway._events import ChannelFailed, SettleDelayed, TurnBegun
from trio_gateway._tally import Histogram, Tally
from trio_gateway.http._metrics import PREFIX, SPECS, Metrics
from trio_gateway.testing import MemoryChannel

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "metrics.md"
ALERTS = ROOT / "deploy" / "alerts.yml"

Numbers = dict[str, float]


def numbers(text: str) -> Numbers:
    """Every sample of a scrape of ours, as `name{label}` without the prefix, and its value."""
    found: Numbers = {}
    read: Any = text_string_to_metric_families
    for family in read(text):
        for sample in family.samples:
            if sample.name.startswith(PREFIX) and not sample.name.endswith("_bucket"):
                labels = ",".join(sample.labels.values())
                name = sample.name.removeprefix(PREFIX)
                found[f"{name}{{{labels}}}" if labels else name] = sample.value
    return found


class Counted(MemoryChannel):
    """A platform in memory that counts from the boot on, as the HTTP channel does."""

    def attach(self, gateway: Gateway) -> None:
        """See `Channel.attach`."""
        self.metrics = Metrics(gateway)


@attrs.define
class Bench:
    """A machine whose gateways are scraped."""

    machine: Machine
    scraped: Numbers = attrs.field(factory=dict[str, float])

    @asynccontextmanager
    async def boot(
        self, agent: Any, settings: Settings | None = None, **more: Any
    ) -> AsyncGenerator[tuple[Gateway, Counted]]:
        """A gateway, and its channel; scraped at the end of the block."""
        channel = Counted(idempotent=True)
        async with (
            self.machine.boot(agent, channel, settings=settings, **more) as gateway,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(channel.metrics.run)
            await channel.wait_ready()
            yield gateway, channel
            await self.scrape(channel)
            nursery.cancel_scope.cancel()

    async def scrape(self, channel: Counted) -> None:
        """Ask for the numbers."""
        body, _ = await channel.metrics.told("text/plain")
        self.scraped = numbers(body.decode())


# ----- what may happen to a gateway


async def answered(bench: Bench) -> None:
    async def agent(turn: Turn) -> str:
        await trio.sleep(3)
        await turn.say("On it.")
        await trio.sleep(4)
        return "done"

    async with bench.boot(agent) as (gateway, channel):
        await channel.receive("ada", "m1", "hi")
        await gateway.wait_idle()


async def answered_in_one_piece(bench: Bench) -> None:
    async def agent(turn: Turn) -> str:
        await trio.sleep(3)
        return "done"

    async with bench.boot(agent) as (gateway, channel):
        await channel.receive("ada", "m1", "hi")
        await gateway.wait_idle()


async def drafted(bench: Bench) -> None:
    async def agent(turn: Turn) -> str:
        await trio.sleep(1)
        turn.progress("thinking")
        await trio.sleep(1)
        turn.progress("It", draft=True)
        await trio.sleep(1)
        return "It is."

    async with bench.boot(agent) as (gateway, channel):
        await channel.receive("ada", "m1", "hi")
        await gateway.wait_idle()


async def sent_twice(bench: Bench) -> None:
    async with bench.boot(Script(open=True)) as (gateway, channel):
        await channel.receive("ada", "m1", "hi")
        await channel.receive("ada", "m1", "hi")
        await gateway.wait_idle()


async def refused(bench: Bench) -> None:
    limits = Limits(open_per_session=1, message_bytes=10)
    agent = Script()
    async with bench.boot(agent, Settings(limits=limits)) as (gateway, channel):
        await channel.receive("ada", "m1", "hi")
        await channel.receive("ada", "m2", "hi")
        await channel.receive("", "m3", "hi")
        await channel.receive("ada", "m4", "more than ten bytes")
        agent.release()
        await gateway.wait_idle()


async def not_allowed(bench: Bench) -> None:
    async def nobody(message: Message) -> bool:
        return False

    async with bench.boot(Script(), authorize=nobody) as (_, channel):
        await channel.receive("ada", "m1", "hi")


async def unreadable(bench: Bench) -> None:
    async with bench.boot(Script()) as (_, channel):
        assert channel._intake is not None
        channel._intake.refused_input("line 1", "no JSON")


async def from_elsewhere(bench: Bench) -> None:
    async with bench.boot(Script()) as (gateway, _):
        await gateway.accept(msg("ada", "m1", channel="stranger"))
        await gateway.accept(msg("ada", "m2"))


async def waiting(bench: Bench) -> None:
    agent = Script()
    async with bench.boot(agent, Settings(limits=Limits(turns=1))) as (gateway, channel):
        await channel.receive("ada", "m1", "hi")
        await channel.receive("bob", "m2", "hi")
        await agent.wait_begun(1)
        await trio.sleep(5)
        await bench.scrape(channel)
        at_work = bench.scraped
        agent.release()
        await gateway.wait_idle()
    bench.scraped |= {f"then {name}": value for name, value in at_work.items()}


async def killed(bench: Bench, kills: int = 1, **rules: Any) -> None:
    agent = Script()
    settings = Settings(resume=ResumeRules(**rules))
    for n in range(kills):
        async with bench.boot(agent, settings) as (gateway, channel):
            if not n:
                await channel.receive("ada", "m1", "hi")
            await agent.wait_begun(n + 1)
            bench.machine.crash()
            gateway.request_stop(now=True)
    agent.release()
    async with bench.boot(agent, settings) as (gateway, _):
        await gateway.wait_idle()


async def quarantined(bench: Bench) -> None:
    await killed(bench, max_crashes=1)


async def expired(bench: Bench) -> None:
    agent = Script()
    async with bench.boot(agent) as (gateway, channel):
        await channel.receive("ada", "m1", "hi")
        await agent.wait_begun(1)
        bench.machine.crash()
        gateway.request_stop(now=True)
    await trio.sleep(4000)
    async with bench.boot(agent) as (gateway, _):
        await gateway.wait_idle()


async def stopped(bench: Bench) -> None:
    """The gateway: of two turns, one ends in the window. Scraped when it has left."""
    agent = Script()
    channel = Counted()
    async with bench.machine.boot(agent, channel, settings=Settings(grace=5)) as gateway:
        await channel.wait_ready()
        await channel.receive("ada", "m1", "hi")
        await channel.receive("bob", "m2", "hi")
        await agent.wait_begun(2)
        gateway.request_stop()
        await trio.sleep(2)
        agent.release("ada")
    await bench.scrape(channel)


async def restarted(bench: Bench) -> None:
    await stopped(bench)
    async with bench.boot(Script(open=True)) as (gateway, _):
        await gateway.wait_idle()


async def draining(bench: Bench) -> None:
    agent = Script()
    async with bench.boot(agent) as (gateway, channel):
        await channel.receive("ada", "m1", "hi")
        await agent.wait_begun(1)
        gateway.request_stop()
        await gateway.draining.wait_value(True)
        await trio.sleep(1.5)
        await bench.scrape(channel)
        then = bench.scraped
        agent.release()
    bench.scraped = then


async def ended_by_its_user(bench: Bench) -> None:
    agent = Script()
    async with bench.boot(agent) as (gateway, channel):
        await channel.receive("ada", "m1", "hi")
        await agent.wait_begun(1)
        await channel.receive("ada", "m2", "/stop")
        await gateway.wait_idle()


async def failed(bench: Bench) -> None:
    async def agent(turn: Turn) -> str:
        raise RuntimeError("no")

    async with bench.boot(agent) as (gateway, channel):
        await channel.receive("ada", "m1", "hi")
        await gateway.wait_idle()


async def with_steps(bench: Bench) -> None:
    async def agent(turn: Turn) -> str:
        for _ in range(3):
            await turn.step(str, 7)
        return "done"

    async with bench.boot(agent) as (gateway, channel):
        await channel.receive("ada", "m1", "hi")
        await gateway.wait_idle()


async def not_sent(bench: Bench) -> None:
    async def fail(delivery: Delivery) -> None:
        raise OSError("unplugged")

    rules = DeliveryRules(first_delay=1000, max_delay=1000)
    async with bench.boot(Script(open=True), Settings(delivery=rules)) as (_, channel):
        channel.before_send = fail
        await channel.receive("ada", "m1", "hi")
        await trio.sleep(60)


async def undeliverable(bench: Bench) -> None:
    async def fail(delivery: Delivery) -> None:
        raise Undeliverable("they left")

    async with bench.boot(Script(open=True)) as (gateway, channel):
        channel.before_send = fail
        await channel.receive("ada", "m1", "hi")
        await gateway.wait_idle()


async def full_disk(bench: Bench) -> None:
    """While a turn settles."""
    agent = Script()
    async with bench.boot(agent) as (gateway, channel):
        await channel.receive("ada", "m1", "hi")
        await agent.wait_begun(1)
        bench.machine.on_commit = _no_room
        agent.release()
        await bench.machine.log.wait_for(SettleDelayed)
        with pytest.raises(StoreFull):
            await channel.receive("ada", "m2", "hi")
        bench.machine.on_commit = None
        await gateway.wait_idle()


def _no_room(moment: str) -> None:
    if moment == "before":
        raise apsw.FullError("database or disk is full")


async def not_marked(bench: Bench) -> None:
    agent, channel = Script(), Counted()
    async with bench.machine.boot(agent, channel) as gateway:
        await channel.wait_ready()
        await channel.receive("ada", "m1", "hi")
        await agent.wait_begun(1)
        bench.machine.on_commit = _no_room
        gateway.request_stop(now=True)
        await gateway.draining.wait_value(True)
        bench.machine.on_commit = None
    await bench.scrape(channel)


async def broken_down(bench: Bench) -> None:
    async with bench.boot(Script()) as (_, channel):
        channel.break_down(OSError("gone"))
        await bench.machine.log.wait_for(ChannelFailed)
        await channel.wait_ready()


async def paused(bench: Bench) -> None:
    async with bench.boot(Script()) as (gateway, _):
        gateway.pause()


async def idle(bench: Bench) -> None:
    async with bench.boot(Script()):
        await trio.sleep(10)


Scenario = Callable[[Bench], Awaitable[None]]

CASES: tuple[tuple[str, float, Scenario], ...] = (
    ("info{0.1.0}", 1, idle),
    ("state{serving}", 1, idle),
    ("state{draining}", 0, idle),
    ("state{draining}", 1, draining),
    ("state{stopped}", 1, stopped),
    ("paused", 1, paused),
    ("paused", 0, idle),
    ("messages_accepted_total{memory}", 1, answered),
    ("messages_accepted_total{memory}", 1, sent_twice),
    ("messages_accepted_total{other}", 1, from_elsewhere),
    ("messages_accepted_total{local}", 1, from_elsewhere),
    ("messages_duplicate_total", 1, sent_twice),
    ("messages_refused_total{full}", 1, refused),
    ("messages_refused_total{malformed}", 1, refused),
    ("messages_refused_total{too_large}", 1, refused),
    ("messages_refused_total{not_allowed}", 1, not_allowed),
    ("input_unreadable_total{memory}", 1, unreadable),
    ("then messages_queued", 1, waiting),
    ("messages_queued", 0, waiting),
    ("then open_turns{running}", 1, waiting),
    ("open_turns{running}", 0, waiting),
    ("open_turns{resume_pending}", 1, draining),
    ("then turns_running", 1, waiting),
    ("turns_running", 0, waiting),
    ("then turn_slots_free", 0, waiting),
    ("turn_slots_free", 1, waiting),
    ("turn_attempts_total", 2, waiting),
    ("turn_attempts_total", 1, killed),
    ("turns_resumed_total{crash}", 1, killed),
    ("turns_resumed_total{shutdown}", 1, restarted),
    ("turns_settled_total{completed}", 1, answered),
    ("turns_settled_total{failed}", 1, failed),
    ("turns_settled_total{stopped}", 1, ended_by_its_user),
    ("turns_settled_total{quarantined}", 1, quarantined),
    ("turns_settled_total{expired}", 1, expired),
    ("turns_interrupted_total", 1, stopped),
    ("turns_marked_total", 2, stopped),
    ("markings_failed_total", 1, not_marked),
    ("steps_remembered_total", 3, with_steps),
    ("quarantined_messages", 1, quarantined),
    ("queue_seconds_count", 2, waiting),
    ("queue_seconds_sum", 5, waiting),
    ("queue_seconds_count", 0, killed),
    ("first_text_seconds_sum", 3, answered),
    ("first_text_seconds_sum", 3, answered_in_one_piece),
    ("first_text_seconds_sum", 2, drafted),
    ("first_text_seconds_count", 1, drafted),
    ("first_text_seconds_count", 0, killed),
    ("turn_seconds_sum", 7, answered),
    ("turn_seconds_count", 1, killed),
    ("settle_seconds_count", 1, answered),
    ("settle_seconds_count", 0, ended_by_its_user),
    ("settles_delayed_total", 1, full_disk),
    ("commit_seconds_count", 6, answered),
    ("commit_operations_sum", 6, answered),
    ("store_troubles_total{accept}", 1, full_disk),
    ("store_readable", 1, answered),
    ("store_readable", 0, stopped),
    ("outbox_deliveries", 1, not_sent),
    ("outbox_oldest_seconds", 60, not_sent),
    ("outbox_oldest_seconds", 0, answered),
    ("delivery_tries_total{delivered}", 2, answered),
    ("delivery_tries_total{delayed}", 1, not_sent),
    ("delivery_tries_total{dead}", 1, undeliverable),
    ("dead_letters", 1, undeliverable),
    ("channel_failures_total{memory}", 1, broken_down),
    ("drain_seconds", 1.5, draining),
    ("drain_seconds", 0, answered),
    ("drain_phase_seconds{mark}", 0, draining),
    ("drain_phase_seconds{drain}", 5, stopped),
    ("loop_lag_seconds_count", 20, idle),
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "scenario"), CASES, ids=lambda one: getattr(one, "__name__", str(one))
)
async def test_each_metric_moves_when_it_should(
    machine: Machine, autojump_clock: MockClock, name: str, value: float, scenario: Scenario
) -> None:
    bench = Bench(machine)
    await scenario(bench)

    assert bench.scraped[name] == pytest.approx(value, abs=0.01)


def test_every_metric_has_a_case() -> None:
    """A new metric fails here until a case above says when it moves."""
    tried = {re.sub(r"^then |_(total|count|sum)(?=\{|$)|\{.*", "", name) for name, _, _ in CASES}

    assert tried == {spec.name for spec in SPECS}


# ----- the writer


async def test_commits_are_counted_on_the_thread_that_makes_them(tmp_path: Path) -> None:
    """Nineteen arrivals wait while one is committed: two transactions, twenty operations."""
    go_on, hold, held = threading.Event(), threading.Event(), trio.Event()
    token = trio.lowlevel.current_trio_token()

    def tap(moment: str) -> None:
        if moment == "before" and hold.is_set():
            hold.clear()
            token.run_sync_soon(held.set)
            go_on.wait(PATIENCE)

    async with open_gateway(Script(open=True), store=tmp_path / "g.db", tap=tap) as gateway:
        tally = gateway.count()
        gateway.pause()
        commits = tally.commit_seconds.count
        hold.set()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(gateway.accept, msg("s", "m"))
            await held.wait()
            for n in range(19):
                nursery.start_soon(gateway.accept, msg(f"s{n}", f"m{n}"))
            await wait_all_tasks_blocked()
            go_on.set()

        assert tally.commit_seconds.count - commits == 2
        assert dict(tally.commit_operations.cumulated())[10.0] == commits + 1
        assert dict(tally.commit_operations.cumulated())[20.0] == commits + 2
        assert tally.commit_seconds.sum > 0
        gateway.unpause()
        await gateway.wait_idle()


# ----- over HTTP


async def test_a_scrape_needs_the_token(tmp_path: Path) -> None:
    async with open_door(tmp_path, Script(open=True)) as door:
        without = await door.client.get("/metrics", headers={"authorization": ""})
        wrong = await door.client.get("/metrics", headers={"authorization": "Bearer wrong"})
        foreign = await door.client.get("/metrics", headers={"host": "evil.example"})
        right = await door.client.get("/metrics", headers={"authorization": f"Bearer {TOKEN}"})

    assert (without.status_code, wrong.status_code, foreign.status_code) == (401, 401, 421)
    assert right.status_code == 200
    assert "trio_gateway" not in without.text + wrong.text + foreign.text


async def test_both_formats_are_spoken(tmp_path: Path) -> None:
    async with open_door(tmp_path, Script(open=True)) as door:
        await door.post("ada", "hi", headers={"prefer": "wait=10"})
        text = await door.client.get("/metrics")
        accept = "application/openmetrics-text; version=1.0.0"
        newer = await door.client.get("/metrics", headers={"accept": accept})

    assert text.headers["content-type"].startswith("text/plain; version=")
    assert newer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    read: Any = read_openmetrics
    told = {family.name: family for family in read(newer.text)}
    assert told["trio_gateway_turns_settled"].type == "counter"
    assert told["trio_gateway_turn_seconds"].type == "histogram"
    assert numbers(text.text)["turns_settled_total{completed}"] == 1
    assert "process_resident_memory_bytes" in text.text


async def test_no_label_holds_what_a_stranger_chose(tmp_path: Path) -> None:
    async def agent(turn: Turn) -> str:
        await turn.step(len, turn.text, name="chosen-step")
        raise RuntimeError("chosen-error")

    async with open_door(tmp_path, agent) as door:
        before = (await door.client.get("/metrics")).text
        for n in range(3):
            more = {"id": f"chosen-id-{n}", "sender": "chosen-sender"}
            await door.post(f"chosen-{n}", "chosen-text", headers={"prefer": "wait=10"}, **more)
        await door.post("", "chosen", id="x")
        after = (await door.client.get("/metrics")).text

    assert "chosen" not in after
    assert numbers(after)["turns_settled_total{failed}"] == 3
    assert set(numbers(after)) == set(numbers(before))


async def test_the_loop_is_late_when_it_was_blocked(tmp_path: Path) -> None:
    async def agent(turn: Turn) -> str:
        time.sleep(1.2)  # noqa: ASYNC251 - the fault
        return "done"

    async with open_door(tmp_path, agent) as door:
        await door.post("ada", "hi", headers={"prefer": "wait=10"})
        with trio.fail_after(PATIENCE):
            while True:
                told = numbers((await door.client.get("/metrics")).text)
                if told["loop_lag_seconds_sum"] > 0.5:
                    break
                await trio.sleep(0.05)


async def test_a_store_that_does_not_answer_costs_a_scrape_its_gauges(tmp_path: Path) -> None:
    release = threading.Event()
    async with open_door(tmp_path, Script()) as door, trio.open_nursery() as nursery:
        nursery.start_soon(door.gateway.inspect, lambda _: release.wait(PATIENCE))
        with trio.fail_after(PATIENCE):
            told = numbers((await door.client.get("/metrics")).text)
        release.set()
        again = numbers((await door.client.get("/metrics")).text)

    assert told["store_readable"] == 0
    assert "outbox_deliveries" not in told
    assert told["state{serving}"] == 1
    assert (again["store_readable"], again["outbox_deliveries"]) == (1, 0)


async def test_many_scrapes_at_once_are_answered(tmp_path: Path) -> None:
    answers: list[float] = []
    async with open_door(tmp_path, Script()) as door:

        async def scrape() -> None:
            told = await door.client.get("/metrics")
            answers.append(numbers(told.text)["store_readable"])

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(scrape)

    assert answers == [1.0] * 20


async def test_a_scrape_while_the_gateway_drains(tmp_path: Path) -> None:
    agent = Script()
    async with open_door(tmp_path, agent, settings=Settings(grace=PATIENCE)) as door:
        await door.post("ada", "hi")
        await agent.wait_begun(1)
        door.gateway.request_stop()
        await door.gateway.draining.wait_value(True)
        told = numbers((await door.client.get("/metrics")).text)
        agent.release()

    assert told["state{draining}"] == 1
    assert told["turns_marked_total"] == 1
    assert told["open_turns{resume_pending}"] == 1
    assert told["drain_phase_seconds{mark}"] >= 0
    assert told["drain_seconds"] > 0


# ----- the tally itself


def test_a_histogram_counts_up_to_its_bounds() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (-1.0, 1.0, 1.5, 2.0, 7.0):
        histogram.observe(value)

    assert list(histogram.cumulated()) == [(1.0, 2), (2.0, 4), (float("inf"), 5)]
    assert (histogram.count, histogram.sum) == (5, 11.5)


async def test_a_tally_forgets_turns_that_have_ended(
    machine: Machine, autojump_clock: MockClock
) -> None:
    channel = Counted()
    async with machine.boot(Script(open=True), channel) as gateway:
        await channel.wait_ready()
        for n in range(50):
            await channel.receive(f"s{n}", f"m{n}", "hi")
        await gateway.wait_idle()

        assert gateway.count()._open == {}


async def test_who_does_not_ask_is_not_counted_for(tmp_path: Path) -> None:
    """A gateway that nobody scrapes builds no event for it."""
    async with open_gateway(Script(open=True), store=tmp_path / "g.db") as gateway:
        assert not gateway._events.heard
        tally = gateway.count()
        assert gateway.count() is tally
        await gateway.ask(msg("ada", "m1"))

        assert tally.settled["completed"] == 1


def test_a_tally_takes_any_event() -> None:
    heard: list[type[Event]] = list(Tally(("x",), lambda: 0.0)._handlers)

    assert TurnBegun in heard
    assert len(heard) == len(set(heard))


# ----- the page, and the rules


def test_the_page_lists_every_metric_and_no_other() -> None:
    row = re.compile(r"^\| `(trio_gateway_\w+)` \| (\w+) \| ([^|]*) \| ([^|]+) \|$", re.M)
    listed = [match.groups() for match in row.finditer(PAGE.read_text())]

    assert listed == [
        (spec.full_name, spec.kind, ", ".join(f"`{label}`" for label in spec.labels), spec.told)
        for spec in SPECS
    ]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_names_follow_the_conventions(spec: Any) -> None:
    assert re.fullmatch(r"[a-z][a-z_]+[a-z]", spec.name)
    assert not spec.name.endswith(("total", "count", "sum", "bucket"))
    assert spec.told.endswith(".")
    if spec.kind == "histogram":
        assert spec.name.endswith(("_seconds", "_operations"))


def rules() -> list[dict[str, Any]]:
    """The alert rules."""
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    assert group["name"] == "trio-gateway"
    found: list[dict[str, Any]] = group["rules"]
    return found


def test_the_alert_rules_ask_for_what_there_is() -> None:
    queried = {spec.full_name: spec for spec in SPECS}

    assert len(rules()) == 3
    for rule in rules():
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
        assert re.fullmatch(r"\d+[smh]", rule["for"])
        assert set(rule["annotations"]) == {"summary", "description"}
        named = re.findall(r"(trio_gateway_\w+)(?:\{(\w+)=)?", rule["expr"])
        assert named
        for name, label in named:
            assert name in queried
            assert not label or label in queried[name].labels
        assert rule["expr"].count("(") == rule["expr"].count(")")


def test_the_page_tells_every_alert() -> None:
    page = PAGE.read_text()

    for rule in rules():
        assert f"`{rule['alert']}`" in page
