"""Bad input costs one error (promise 14): from programs, agents, channels, hooks and operators."""

from __future__ import annotations

import asyncio
import decimal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apsw
import pytest
import trio
from helpers import Machine, Script, msg, settled_well
from trio.testing import MockClock

from trio_gateway import (
    ConfigError,
    Cursor,
    Delivery,
    Gateway,
    InvalidInput,
    Message,
    Refused,
    RetryLater,
    SessionKey,
    StepInDoubt,
    StepNotStorable,
    Turn,
    Undeliverable,
)
from trio_gateway._cli import main
from trio_gateway._config import load_config
from trio_gateway._events import ChannelFailed, GatewayFailed, StoreTrouble
from trio_gateway._policy import SORRY, split_text
from trio_gateway._views import config_as_toml
from trio_gateway.channels._fds import Line
from trio_gateway.channels.jsonl import _read_line
from trio_gateway.testing import MemoryChannel, check_invariants


class Mute(Exception):
    """Cannot say what it is."""

    def __str__(self) -> str:
        raise RuntimeError("no words")

    __repr__ = __str__


class Nameless(StepInDoubt):
    """Made without what it should say."""

    def __init__(self) -> None:
        Exception.__init__(self)


class Bare(BaseException):
    """No `Exception`."""


FAULTS: list[Callable[[], BaseException]] = [
    Mute, Nameless, Bare, asyncio.CancelledError, lambda: SystemExit(3),
    lambda: ValueError("\ud800"), lambda: ValueError("x" * 100_000),
    lambda: BaseExceptionGroup("several", [Mute(), SystemExit(3)]),
]  # fmt: skip


async def well(machine: Machine, gateway: Gateway) -> None:
    """Nothing is open, nothing has leaked, and the gateway's own code did not fail."""
    await gateway.wait_idle()
    settled_well(gateway)
    assert machine.log.of(GatewayFailed) == []
    check_invariants(machine.store, settled=True)


# ----- programs


@pytest.mark.parametrize("thing", [None, 5, "text", {"session": "a"}, Message, object()])
async def test_p14_what_is_no_message_leaves_nothing_behind(
    machine: Machine, autojump_clock: MockClock, thing: Any
) -> None:
    """Nothing of the batch is taken, no slot and no count is lost."""
    async with machine.boot(Script(open=True)) as gateway:
        with pytest.raises(InvalidInput, match="Message"):
            await gateway.accept([msg("a", "m1"), thing])
        with pytest.raises(InvalidInput, match="Message"):
            await gateway.ask(thing)
        settled_well(gateway)
        assert machine.rows("SELECT 1 FROM message") == []
        assert (await gateway.ask(msg("a", "m1")))[-1].text == "re: hi"
        await well(machine, gateway)


async def test_p14_whoever_asks_under_a_name_that_is_none_is_refused(
    machine: Machine, autojump_clock: MockClock
) -> None:
    names: list[Any] = [[], 5, Mute(), "", "\ud800"]
    async with machine.boot(Script(open=True)) as gateway:
        for name in names:
            with pytest.raises(Refused, match="id"):
                await gateway.ask(Message(session="a", id=name, text="hi"))
        await well(machine, gateway)


@pytest.mark.parametrize("name", ["\ud800", 5, None, [], Mute()])
async def test_p14_a_session_by_a_name_that_is_none(
    machine: Machine, autojump_clock: MockClock, name: Any
) -> None:
    async with machine.boot(Script(open=True)) as gateway:
        for key in (SessionKey("local", name), SessionKey(name, "a"), name):
            with pytest.raises(InvalidInput, match="session"):
                await gateway.history(key)
            with pytest.raises(InvalidInput, match="session"):
                await gateway.stop_turn(key)
        limit: Any = "5"
        with pytest.raises(InvalidInput, match="limit"):
            await gateway.history(SessionKey("local", "a"), limit)
        with pytest.raises(InvalidInput, match="cursor"):
            await gateway.accept(msg("a", "m1"), cursor=limit)
        assert await gateway.history(SessionKey("local", "a"), 10**30) == ()
        await well(machine, gateway)


async def test_p14_a_cursor_must_be_a_text(machine: Machine, autojump_clock: MockClock) -> None:
    value: Any = Mute()
    async with machine.boot(Script(open=True)) as gateway:
        with pytest.raises(InvalidInput, match=r"cursor\.value"):
            await gateway.accept(msg("a", "m1"), cursor=Cursor(channel="chat", value=value))


def test_p14_a_session_key_is_parsed_from_a_text() -> None:
    thing: Any = 5
    with pytest.raises(InvalidInput, match="session key"):
        SessionKey.parse(thing)


# ----- agents


@pytest.mark.parametrize("fault", FAULTS)
async def test_p14_whatever_an_agent_raises_ends_its_own_turn(
    machine: Machine, autojump_clock: MockClock, fault: Callable[[], BaseException]
) -> None:
    async def agent(turn: Turn) -> str:
        if turn.session.name == "bad":
            raise fault()
        return "fine"

    async with machine.boot(agent) as gateway:
        await gateway.ask(msg("bad", "m1"))
        assert (await gateway.ask(msg("good", "m2")))[-1].text == "fine"
        await well(machine, gateway)
    assert machine.fate("m1") == "failed"
    assert machine.said("bad") == [SORRY]
    ((error,),) = machine.rows("SELECT error FROM turn WHERE state = 'FAILED'")
    assert 0 < len(error) < 2000


async def test_p14_a_step_that_goes_round_is_not_storable(
    machine: Machine, autojump_clock: MockClock
) -> None:
    async def round() -> list[Any]:
        circle: list[Any] = []
        circle.append(circle)
        return circle

    async def agent(turn: Turn) -> str:
        with pytest.raises(StepNotStorable):
            await turn.step(round)
        with pytest.raises(InvalidInput, match="limit"):
            limit: Any = "5"
            await turn.history(limit)
        return "went on"

    async with machine.boot(agent) as gateway:
        assert (await gateway.ask(msg("a", "m1")))[-1].text == "went on"


# ----- channels and hooks


LATER: list[Any] = [decimal.Decimal("2.5"), decimal.Decimal("NaN"), float("nan"), True]
SENT: list[Callable[[], BaseException]] = [
    *FAULTS,
    lambda: Undeliverable("\ud800"),
    lambda: RetryLater(1.0, "\ud800"),
    *(lambda after=after: RetryLater(after) for after in LATER),
]


@pytest.mark.parametrize("fault", SENT)
async def test_p14_whatever_a_channel_raises_costs_its_own_delivery(
    machine: Machine, autojump_clock: MockClock, fault: Callable[[], BaseException]
) -> None:
    faults = [fault()]

    async def before_send(delivery: Delivery) -> None:
        await trio.lowlevel.checkpoint()
        if faults:
            raise faults.pop()

    channel = MemoryChannel("chat")
    channel.before_send = before_send
    async with machine.boot(Script(open=True), channel) as gateway:
        await channel.receive("a", "m1", "1")
        await channel.receive("b", "m2", "2")
        await well(machine, gateway)
    assert "re: 2" in channel.texts()


class Falling(MemoryChannel):
    """Falls over in whatever it is asked for, a few times."""

    def __init__(self, fault: Callable[[], BaseException]) -> None:
        super().__init__("chat", text_limit=3)
        self.fault = fault
        self.falls = 2

    async def serve(self, *args: Any, **more: Any) -> None:
        self.falls -= 1
        if self.falls >= 0:
            raise self.fault()
        await super().serve(*args, **more)

    def text_length(self, text: str) -> int:
        raise self.fault()

    def progress(self, session: str, text: str) -> None:
        raise self.fault()


@pytest.mark.parametrize("fault", FAULTS)
async def test_p14_a_channel_that_falls_over_is_served_again(
    machine: Machine, autojump_clock: MockClock, fault: Callable[[], BaseException]
) -> None:
    """And a text that it cannot measure is sent whole."""

    async def agent(turn: Turn) -> str:
        turn.progress("at it")
        return "a longer text"

    channel = Falling(fault)
    async with machine.boot(agent, channel) as gateway:
        await channel.receive("a", "m1", "hi")
        await well(machine, gateway)
    assert channel.texts() == ["a longer text"]
    assert len(machine.log.of(ChannelFailed)) >= 4


@pytest.mark.parametrize("limit", [0, -1, "5", 1.5, True])
async def test_p14_a_text_limit_that_is_none_is_refused(
    machine: Machine, autojump_clock: MockClock, limit: Any
) -> None:
    with pytest.raises(ConfigError, match=r"MemoryChannel\.text_limit"):
        async with machine.boot(Script(), MemoryChannel("chat", text_limit=limit)):
            pass


@pytest.mark.parametrize("name", [5, None, "", "A b"])
async def test_p14_a_channel_name_that_is_none_is_refused(
    machine: Machine, autojump_clock: MockClock, name: Any
) -> None:
    with pytest.raises(ConfigError, match=r"MemoryChannel\.name"):
        async with machine.boot(Script(), MemoryChannel(name)):
            pass


@pytest.mark.parametrize("fault", FAULTS)
async def test_p14_a_hook_that_fails_means_no(
    machine: Machine, autojump_clock: MockClock, fault: Callable[[], BaseException]
) -> None:
    """For a new message, and for a turn that was interrupted."""
    falls = False

    async def authorize(message: Message) -> bool:
        await trio.lowlevel.checkpoint()
        if falls:
            raise fault()
        return True

    agent = Script()
    async with machine.boot(agent, authorize=authorize) as gateway:
        await gateway.accept(msg("a", "m1"))
        await agent.wait_begun(1)
        gateway.request_stop(now=True)
    falls = True
    async with machine.boot(agent, authorize=authorize) as gateway:
        assert not (await gateway.accept(msg("a", "m2"))).accepted
        await well(machine, gateway)
    assert machine.fate("m1") == "quarantined"


async def test_p14_a_store_that_is_busy_for_a_moment_puts_no_turn_aside(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """At the boot, the messages of a turn are read to ask whether its sender is still allowed."""

    async def authorize(message: Message) -> bool:
        await trio.lowlevel.checkpoint()
        return True

    def fail_the_second(moment: str) -> None:
        if moment == "before" and machine.commits == commits + 2:
            raise apsw.BusyError("somebody looks")

    agent = Script()
    async with machine.boot(agent, authorize=authorize) as gateway:
        await gateway.accept(msg("a", "m1"))
        await agent.wait_begun(1)
        gateway.request_stop(now=True)
    agent.release()
    commits = machine.commits
    machine.on_commit = fail_the_second
    async with machine.boot(agent, authorize=authorize) as gateway:
        await well(machine, gateway)
    assert [event.operation for event in machine.log.of(StoreTrouble)] == ["authorise"]
    assert machine.fate("m1") == "answered"


def test_p14_a_book_is_cut_in_a_time_that_grows_with_it() -> None:
    """An agent can say a book: what cuts it looks at what fits, not at all that is left."""
    looked = 0

    def length(text: str) -> int:
        nonlocal looked
        looked += len(text)
        return len(text.encode("utf-16-le")) // 2

    book = "\U0001f600" * 50_000
    parts = split_text(book, 100, length)
    assert "".join(parts) == book
    assert all(length(part) <= 100 for part in parts)
    assert looked < 40 * len(book)


# ----- lines and operators


def test_p14_of_a_million_unknown_fields_five_are_named() -> None:
    fields = ", ".join(f'"field {n}": {n}' for n in range(1000))
    line = f'{{"session": "a", "id": "m1", "text": "hi", {fields}}}'.encode()
    error = _read_line(Line(1, line, len(line)), "jsonl")
    assert error == ("unknown: 'field 0', 'field 1', 'field 2', 'field 3', 'field 4' and 995 more")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[limits]\nturns = " + "9" * 5000, "not TOML"),
        ("[limits]\nturns = 0x" + "f" * 5000, "limits.turns: expected an integer"),
        (".".join(["a"] * 5000) + " = 1", "a: unknown key"),
        ('"a\\nb" = 1', '"a\\nb": unknown key'),
        ("x" * 5000 + " = 1", "unknown key"),
    ],
)
def test_p14_a_configuration_that_is_too_much_is_one_line(
    tmp_path: Path, text: str, said: str
) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file, {})
    (line,) = str(caught.value).split("\n")
    assert said in line
    assert str(file) in line
    assert len(line) < 600


def test_p14_what_is_derived_from_the_longest_grace_can_be_written_down(tmp_path: Path) -> None:
    file, again = tmp_path / "gateway.toml", tmp_path / "again.toml"
    file.write_text('[drain]\ngrace = "36500d"\n')
    again.write_text("\n".join(config_as_toml(load_config(file, {}))))
    assert load_config(again, {}).sections.drain.budget == load_config(file, {}).settings().grace


async def test_p14_words_that_no_store_can_hold(
    machine: Machine, autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    """An argument need not be UTF-8, and a number can be too large for the database."""
    async with machine.boot(Script(open=True)) as gateway:
        await gateway.ask(msg("a", "m1"))
    store = ("--store", str(machine.store))
    for words in (("sessions", "show", "a\udcff"), ("explain", "\udcff")):
        assert main([*words, *store]) == 1
        assert "in this store" in capsys.readouterr().err
    for words in (("sessions", "list"), ("sessions", "show", "local:a")):
        assert main([*words, "--limit", "9" * 30, *store]) == 0
        assert "local:a" in capsys.readouterr().out
    for words in (("dead-letters", "drop"), ("quarantine", "retry")):
        assert main([*words, "--all", *store]) == 0
        assert capsys.readouterr().out.strip()
