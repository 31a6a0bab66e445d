"""The handle that an agent holds, what may be an agent, and steps (promises 3, 8, 10, 13)."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import apsw
import attrs
import pytest
import trio
from helpers import PATIENCE, Log, Machine, Script, msg, settled_well
from trio.testing import MockClock

from trio_gateway import (
    Agent,
    AgentMisuse,
    AgentNotUsable,
    AsyncAgent,
    Gateway,
    Message,
    Reply,
    ReplyKind,
    ResumeReason,
    SessionKey,
    Settings,
    StepInDoubt,
    StepNotStorable,
    Turn,
    TurnState,
    open_gateway,
)
from trio_gateway._events import (
    ProgressShown,
    ReplyCommitted,
    StepRemembered,
    StopRequested,
    StoreTrouble,
    TurnSettled,
)
from trio_gateway._steps import default_name
from trio_gateway.testing import MemoryChannel

QUICK = Settings(grace=1.0, budget=10.0)


async def once(machine: Machine, agent: Agent, text: str = "hi", **more: Any) -> tuple[Reply, ...]:
    """Boot, ask one thing, stop."""
    async with machine.boot(agent, **more) as gateway:
        replies = await gateway.ask(msg("a", "m1", text))
        await gateway.wait_idle()
        settled_well(gateway)
    return replies


async def interrupted(machine: Machine, agent: Agent, *, crash: bool = False) -> None:
    """Boot, hand in one message, and stop or die while its turn runs."""
    async with machine.boot(agent, settings=QUICK) as gateway:
        await gateway.accept(msg("a", "m1", "hi"))
        await trio.sleep(10)
        if crash:
            machine.crash()


async def resumed(machine: Machine, agent: Agent) -> list[str]:
    """Boot again, let everything settle; all that was said."""
    async with machine.boot(agent, settings=QUICK) as gateway:
        await gateway.wait_idle()
        settled_well(gateway)
    return machine.said()


# ----- what may be an agent


class Polite:
    """An agent that is an object."""

    async def __call__(self, turn: Turn) -> str:
        return f"kindly: {turn.text}"


class PlainPolite:
    """One that runs in a thread."""

    def __call__(self, turn: Turn) -> str:
        assert threading.current_thread() is not threading.main_thread()
        return f"kindly: {turn.text}"


class Client:
    """An agent that owns something, as a class."""

    opened: ClassVar[list[str]] = []

    async def __aenter__(self) -> AsyncAgent:
        self.opened.append("in")
        return Polite()

    async def __aexit__(self, *_: object) -> None:
        self.opened.append("out")


@asynccontextmanager
async def owner() -> AsyncGenerator[AsyncAgent, None]:
    """One that owns something, as a function."""
    Client.opened.append("in")
    try:
        yield Polite()
    finally:
        Client.opened.append("out")


async def with_more(prefix: str, turn: Turn) -> str:
    """One that needs to be told more."""
    return f"{prefix}: {turn.text}"


def forgotten_async(turn: Turn) -> Any:
    """One that is plain by its looks, and returns something to await."""
    return with_more("kindly", turn)


def plain(turn: Turn) -> str:
    """One that is a plain function."""
    assert threading.current_thread() is not threading.main_thread()
    return f"kindly: {turn.text}"


AGENTS: list[Agent] = [
    Polite(),
    PlainPolite(),
    plain,
    partial(with_more, "kindly"),
    partial(plain),
    forgotten_async,
]


@pytest.mark.parametrize("agent", AGENTS)
async def test_agents_of_every_kind(tmp_path: Path, agent: Agent) -> None:
    """Async or plain; functions, methods, partials and objects; one that returns an awaitable."""
    with trio.fail_after(PATIENCE):
        async with open_gateway(agent, store=tmp_path / "gateway.db") as gateway:
            (reply,) = await gateway.ask(msg("a", "m1", "please"))
    assert reply.text == "kindly: please"


@pytest.mark.parametrize(
    "agent", [owner, owner(), Client, Client()], ids=lambda a: type(a).__name__
)
async def test_agents_that_own_something(
    machine: Machine, autojump_clock: MockClock, agent: Agent
) -> None:
    """A context manager, or what makes one: entered once, left after the last turn."""
    Client.opened.clear()
    async with machine.boot(agent) as gateway:
        (reply,) = await gateway.ask(msg("a", "m1", "please"))
        assert Client.opened == ["in"]
    assert Client.opened == ["in", "out"]
    assert reply.text == "kindly: please"


async def test_what_an_agent_owns_outlives_its_turns(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """It is closed when the drain is over, not before; its background tasks run meanwhile."""
    story: list[str] = []

    @asynccontextmanager
    async def agent() -> AsyncGenerator[AsyncAgent, None]:
        async def answer(turn: Turn) -> str:
            await trio.sleep(5)
            story.append("answered")
            return "done"

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            yield answer
            story.append("closed")
            nursery.cancel_scope.cancel()

    async with machine.boot(agent) as gateway:
        await gateway.accept(msg("a", "m1"))
    assert story == ["answered", "closed"]


async def a_generator(turn: Turn) -> AsyncIterator[str]:
    """Streams, which is not how an agent answers."""
    yield "part"


async def no_arguments() -> str:
    """Takes nothing."""
    return ""


@pytest.mark.parametrize(
    ("agent", "says"),
    [
        (42, "'int' object is no agent"),
        ("bot.py:agent", "'str' object is no agent"),
        (None, "'NoneType' object is no agent"),
        (a_generator, "'a_generator' is an async generator"),
        (no_arguments, "'no_arguments' cannot be called with one argument, the turn"),
        (with_more, "'with_more' cannot be called with one argument, the turn"),
    ],
)
async def test_p14_what_is_no_agent_is_refused_at_boot(
    machine: Machine, autojump_clock: MockClock, agent: Any, says: str
) -> None:
    """One error that names the thing, before anything is served; the store can be opened again."""
    with pytest.raises(AgentNotUsable, match=says):
        async with machine.boot(agent):
            pytest.fail("it was hosted")
    assert len(await once(machine, Script(open=True))) == 1


async def test_forty_plain_agents_can_all_use_their_turn(tmp_path: Path) -> None:
    """As many plain agents as there are slots block in threads at once, and each still reaches the
    store and runs a step in a thread of its own."""
    many = 60
    inside = 0
    all_inside = threading.Event()
    lock = threading.Lock()

    def think(n: int) -> int:
        return n + 1

    def agent(turn: Turn) -> str:
        nonlocal inside
        with lock:
            inside += 1
            if inside == many:
                all_inside.set()
        assert all_inside.wait(PATIENCE)
        trio.from_thread.run(turn.history)
        trio.from_thread.run(turn.say, "thinking")
        return str(trio.from_thread.run(turn.step, think, 41))

    with trio.fail_after(PATIENCE):
        async with open_gateway(agent, store=tmp_path / "gateway.db") as gateway:
            await gateway.accept([msg(f"s{n}", f"m{n}") for n in range(many)])
            replies = await gateway.ask(msg("s0", "m0"))
            await gateway.wait_idle()
            settled_well(gateway)
    assert [reply.text for reply in replies] == ["thinking", "42"]


async def test_a_plain_agent_can_use_what_does_not_wait(tmp_path: Path) -> None:
    """`progress` and `request_restart` from its thread, while a task waits for events."""
    channel = MemoryChannel()
    shown: list[str] = []

    def agent(turn: Turn) -> str:
        for n in range(20):
            turn.progress(f"{n}")
        assert turn.draining.value is False
        turn.request_restart()
        return turn.idempotency_key("x")

    async def watch(gateway: Gateway) -> None:
        async with gateway.events() as events:
            async for event in events:
                if isinstance(event, ProgressShown):
                    shown.append(event.text)

    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            async with open_gateway(
                agent, store=tmp_path / "gateway.db", channels=[channel]
            ) as gateway:
                nursery.start_soon(watch, gateway)
                await trio.testing.wait_all_tasks_blocked()
                await channel.receive("a", "m1", "hi")
                await gateway.wait_stop_requested()
                assert gateway.stop_reason is ResumeReason.RESTART
            nursery.cancel_scope.cancel()
    assert [text for _, text in channel.shown] == [*map(str, range(20)), ""]
    assert shown == [*map(str, range(20))]
    assert len(channel.sent) == 1


@pytest.mark.parametrize("name", [5, b"x", "a lone \udc80"])
async def test_p14_a_name_of_a_step_that_cannot_be_kept(
    machine: Machine, autojump_clock: MockClock, name: Any
) -> None:
    """Refused before the step runs: what ran could not be remembered."""
    ran: list[str] = []
    errors: list[str] = []

    async def think() -> None:
        ran.append("ran")

    async def agent(turn: Turn) -> str:
        try:
            await turn.step(think, name=name, effect="unsafe")
        except AgentMisuse as error:
            errors.append(str(error))
        return "done"

    await once(machine, agent)
    assert ran == []
    assert "name" in errors[0]


# ----- what an agent returns and raises


@pytest.mark.parametrize("nothing", [None, ""])
async def test_an_agent_may_have_nothing_to_say(
    machine: Machine, autojump_clock: MockClock, nothing: str | None
) -> None:
    """Settled, answered, without a reply."""

    async def agent(turn: Turn) -> str | None:
        return nothing

    assert await once(machine, agent) == ()
    assert machine.fate("m1") == "answered"


@pytest.mark.parametrize("wrong", [42, b"bytes", ["list"], object()])
async def test_p14_an_agent_that_returns_no_text_fails_its_turn(
    machine: Machine, autojump_clock: MockClock, wrong: Any
) -> None:
    """The log names the type and the next step; the sender reads an apology."""

    async def agent(turn: Turn) -> Any:
        return wrong

    (apology,) = await once(machine, agent)
    assert (apology.kind, apology.final) == (ReplyKind.APOLOGY, True)
    (settled,) = machine.log.of(TurnSettled)
    assert settled.state is TurnState.FAILED
    assert f"the agent returned {type(wrong).__name__!r}: return the reply as a str" in (
        settled.error or ""
    )


async def test_an_agent_that_raises_fails_its_turn_and_leaks_nothing(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """The traceback is in the event, and nothing of the error in what the sender reads."""

    async def agent(turn: Turn) -> str:
        token = "sk-1234"
        raise ConnectionError(f"401 for {token}")

    (apology,) = await once(machine, agent)
    assert "401" not in apology.text
    assert "sk-" not in apology.text
    (settled,) = machine.log.of(TurnSettled)
    assert settled.error == "ConnectionError: 401 for sk-1234"
    assert "in agent" in (settled.traceback or "")
    assert machine.fate("m1") == "failed"


@pytest.mark.parametrize(
    "text", ["a lone \udc80 surrogate", "a\0nul", "", "x" * 1_000_000, "two\nlines"]
)
async def test_an_error_with_an_odd_text_fails_its_turn_and_nothing_else(
    machine: Machine, autojump_clock: MockClock, text: str
) -> None:
    """What an exception says is data: file names come with surrogates, for one."""

    async def agent(turn: Turn) -> str:
        raise ValueError(text)

    (apology,) = await once(machine, agent)
    assert apology.kind is ReplyKind.APOLOGY
    assert machine.fate("m1") == "failed"


@pytest.mark.parametrize("text", ["a lone \udc80 surrogate", "a\0nul", "\ud83d\ude00", "👩‍👩‍👧"])
async def test_an_odd_answer_arrives(
    machine: Machine, autojump_clock: MockClock, text: str
) -> None:
    """Halves of a character are joined, lone ones replaced: no reason to lose an answer."""

    async def agent(turn: Turn) -> str:
        await turn.say(text)
        return text

    channel = MemoryChannel()
    async with machine.boot(agent, channel) as gateway:
        await channel.receive("a", "m1", "hi")
        await gateway.wait_idle()
    expected = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert channel.texts() == [expected, expected]


async def test_an_error_group_out_of_an_agents_nursery(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """The event's one line says what really happened."""

    async def fall_over() -> None:
        raise LookupError("the cause")

    async def agent(turn: Turn) -> str:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fall_over)
            nursery.start_soon(trio.sleep_forever)
        return "never"

    await once(machine, agent)
    (settled,) = machine.log.of(TurnSettled)
    assert "the cause" in (settled.error or "")
    assert "LookupError" in (settled.traceback or "")


# ----- the members


async def test_the_members_of_a_turn(machine: Machine, autojump_clock: MockClock) -> None:
    """Each says what the design says."""
    seen: list[dict[str, Any]] = []

    async def agent(turn: Turn) -> str:
        seen.append(
            {
                "messages": turn.messages,
                "message": turn.message,
                "text": turn.text,
                "session": turn.session,
                "attempt": turn.attempt,
                "resumed": turn.resumed,
                "draining": turn.draining.value,
                "checkpointed": turn.checkpointed,
                "id": turn.id,
            }
        )
        assert repr(turn) == f"<Turn {turn.id} of local:a, attempt 1>"
        return "done"

    async with machine.boot(agent) as gateway:
        message = Message(session="a", id="m1", text="hello", sender="u1")
        (reply,) = await gateway.ask(message)
    ((turn_id,),) = machine.rows("SELECT id FROM turn")
    assert seen == [
        {
            "messages": (message,),
            "message": message,
            "text": "hello",
            "session": SessionKey("local", "a"),
            "attempt": 1,
            "resumed": None,
            "draining": False,
            "checkpointed": None,
            "id": turn_id,
        }
    ]
    assert reply == Reply(
        session=SessionKey("local", "a"),
        key=reply.key,
        text="done",
        in_reply_to=("m1",),
        attempt=1,
        final=True,
        kind=ReplyKind.ANSWER,
    )


async def test_p03_no_agent_code_without_a_running_marker(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """The first thing an agent can see from outside is its own marker, in every attempt."""
    seen: list[tuple[str, str | None]] = []

    async def agent(turn: Turn) -> str:
        seen.append(machine.markers()[turn.session.name])
        await trio.sleep(5)
        return "done"

    async with machine.boot(agent, settings=QUICK) as gateway:
        await gateway.accept([msg("a", "m1"), msg("a", "m2"), msg("b", "m3")])
        await trio.sleep(7)
    async with machine.boot(agent) as gateway:
        await gateway.wait_idle()
    assert seen == [("RUNNING", None)] * 4


async def test_say_is_committed_and_delivered_at_once(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """On its way while the turn still runs, in order, not final."""
    channel = MemoryChannel()
    waits = trio.Event()

    async def agent(turn: Turn) -> str:
        await turn.say("one")
        assert machine.said() == ["one"]
        await turn.say("two")
        await waits.wait()
        return "three"

    async with machine.boot(agent, channel) as gateway:
        await channel.receive("a", "m1", "hi")
        said = await channel.wait_sent(2)
        assert [(d.text, d.final, d.kind) for d in said] == [
            ("one", False, ReplyKind.SAY),
            ("two", False, ReplyKind.SAY),
        ]
        waits.set()
        await gateway.wait_idle()
        settled_well(gateway)
    assert channel.texts() == ["one", "two", "three"]
    assert [d.final for d in channel.sent] == [False, False, True]
    assert len({d.key for d in channel.sent}) == 3
    assert [e.text for e in machine.log.of(ReplyCommitted)] == ["one", "two", "three"]


async def test_say_of_a_resumed_turn_is_not_heard_twice(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """The same at the same place is said once; something else is said; keys stay."""
    channel = MemoryChannel()

    async def agent(turn: Turn) -> str:
        await turn.say("always the same")
        await turn.say(f"attempt {turn.attempt}")
        if turn.attempt < 3:
            await trio.sleep_forever()
        await turn.say("new")
        return "done"

    async with machine.boot(agent, channel, settings=QUICK):
        await channel.receive("a", "m1", "hi")
        await trio.sleep(1)
    for _ in range(2):
        async with machine.boot(agent, channel, settings=QUICK) as gateway:
            await trio.sleep(1)
    assert channel.texts() == [
        "always the same",
        "attempt 1",
        "attempt 2",
        "attempt 3",
        "new",
        "done",
    ]
    assert len({d.key for d in channel.sent}) == 6
    async with machine.boot(agent, channel) as gateway:
        history = await gateway.history(SessionKey("memory", "a"))
    assert [item.text for item in history] == ["hi", *channel.texts()]


@pytest.mark.parametrize("wrong", [None, 42, b"bytes"])
async def test_p14_say_takes_text_only(
    machine: Machine, autojump_clock: MockClock, wrong: Any
) -> None:
    """A clear error to the agent; nothing is sent."""
    errors: list[str] = []

    async def agent(turn: Turn) -> str:
        try:
            await turn.say(wrong)
        except TypeError as error:
            errors.append(str(error))
        return "done"

    assert len(await once(machine, agent)) == 1
    assert errors == [f"say: expected a str, got {type(wrong).__name__}"]


async def test_progress_is_ephemeral(machine: Machine, autojump_clock: MockClock) -> None:
    """Shown, replaced, gone at the end; never stored; nothing to a channel that is away."""
    channel = MemoryChannel()

    async def agent(turn: Turn) -> str:
        turn.progress("thinking")
        turn.progress("still thinking")
        if turn.message.channel == "memory":
            channel.break_down(OSError("gone"))
            await trio.sleep(0.1)
            turn.progress("unseen")
        return "done"

    async with machine.boot(agent, channel) as gateway:
        await gateway.ask(msg("a", "m0"))
        await channel.receive("a", "m1", "hi")
        await gateway.wait_idle()
    assert channel.shown == [("a", "thinking"), ("a", "still thinking")]
    assert channel.texts() == ["done"]
    assert len(machine.log.of(ProgressShown)) == 5
    assert machine.rows("SELECT count(*) FROM delivery WHERE text LIKE '%thinking%'") == [(0,)]


async def test_the_handle_of_a_turn_that_is_over_refuses(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Who keeps it gets a clear error from all that would write, and silence from progress."""
    kept: list[Turn] = []

    async def agent(turn: Turn) -> str:
        kept.append(turn)
        return "done"

    async with machine.boot(agent) as gateway:
        await gateway.ask(msg("a", "m1"))
        await gateway.wait_idle()
        (turn,) = kept
        stored = machine.rows("SELECT * FROM delivery")
        for late in (
            partial(turn.say, "late"),
            partial(turn.checkpoint, 1),
            partial(turn.step, trio.sleep, 0),
            turn.take,
        ):
            with pytest.raises(AgentMisuse, match="this turn is over"):
                await late()
        with pytest.raises(AgentMisuse, match="request_restart: this turn is over"):
            turn.request_restart()
        turn.progress("late")
        assert machine.rows("SELECT * FROM delivery") == stored
    assert machine.log.of(ProgressShown) == []
    assert gateway.stop_reason is ResumeReason.SHUTDOWN


async def test_a_late_attempt_changes_nothing(machine: Machine, autojump_clock: MockClock) -> None:
    """An attempt that was stopped but does not end: what it still says and remembers is refused,
    and its answer is not taken."""
    errors: list[str] = []

    async def agent(turn: Turn) -> str:
        with trio.CancelScope(shield=True):
            await trio.sleep(10)
            for late in (
                partial(turn.say, "late"),
                partial(turn.checkpoint, 1),
                partial(turn.step, trio.sleep, 0, name="s"),
                partial(turn.step, trio.sleep, 0, name="u", effect="unsafe"),
            ):
                try:
                    await late()
                except AgentMisuse as error:
                    errors.append(str(error))
        return "late answer"

    async with machine.boot(agent) as gateway:
        await gateway.accept(msg("a", "m1"))
        await trio.sleep(1)
        await gateway.accept(msg("a", "c1", "/stop"))
        await gateway.wait_idle()
        settled_well(gateway)
    assert machine.said() == ["Stopped."]
    assert errors == [
        "say: this turn is over",
        "checkpoint: this turn is over",
        "step 's': this turn is over",
        "step 'u': this turn is over",
    ]
    assert machine.rows("SELECT count(*) FROM step") == [(0,)]


# ----- why it is cancelled


async def test_the_time_limit_ends_an_attempt(machine: Machine, autojump_clock: MockClock) -> None:
    """FAILED, with words of its own; `Cancelled` says that it was a deadline."""
    sources: list[str] = []

    async def agent(turn: Turn) -> str:
        try:
            await trio.sleep_forever()
        except trio.Cancelled as cancelled:
            sources.append(cancelled.source)
            raise
        return "never"

    began = trio.current_time()
    (apology,) = await once(machine, agent, settings=Settings(time_limit=30.0))
    assert trio.current_time() - began == pytest.approx(30.0)
    assert "too long" in apology.text
    assert sources == ["deadline"]
    (settled,) = machine.log.of(TurnSettled)
    assert (settled.state, settled.error) == (TurnState.FAILED, "took longer than its time limit")


async def test_the_time_limit_is_per_attempt(machine: Machine, autojump_clock: MockClock) -> None:
    """A resumed attempt has all of it again."""

    async def agent(turn: Turn) -> str:
        await trio.sleep(20 if turn.resumed else 25)
        return "done"

    settings = Settings(time_limit=28.0, grace=1.0)
    async with machine.boot(agent, settings=settings) as gateway:
        await gateway.accept(msg("a", "m1"))
        await trio.sleep(20)
    async with machine.boot(agent, settings=settings) as gateway:
        await gateway.wait_idle()
    assert machine.said() == ["done"]


async def test_a_cancelled_turn_is_told_why(machine: Machine, autojump_clock: MockClock) -> None:
    """By the drain, by the user: `Cancelled.reason` tells them apart."""
    reasons: dict[str, str | None] = {}

    async def agent(turn: Turn) -> str:
        try:
            await trio.sleep_forever()
        except trio.Cancelled as cancelled:
            reasons[turn.session.name] = cancelled.reason
            raise
        return "never"

    async with machine.boot(agent, settings=QUICK) as gateway:
        await gateway.accept([msg(name, name) for name in ("drained", "stopped", "by host")])
        await trio.sleep(1)
        await gateway.accept(msg("stopped", "c1", "/stop"))
        await gateway.stop_turn(SessionKey("local", "by host"))
    assert reasons == {
        "drained": "the gateway stops; this turn resumes at the next boot",
        "stopped": "stopped by the user",
        "by host": "stopped by the user",
    }


async def test_draining_is_seen_by_agents(machine: Machine, autojump_clock: MockClock) -> None:
    """It can be awaited, after the markers and before the cancellation."""
    seen: list[tuple[str, float]] = []

    async def agent(turn: Turn) -> str:
        await turn.draining.wait_value(True)
        seen.append((machine.markers()["a"][0], trio.current_time()))
        return "in time"

    async with machine.boot(agent) as gateway:
        await gateway.accept(msg("a", "m1"))
        await trio.sleep(3)
        gateway.request_stop()
        began = trio.current_time()
    assert seen == [("RESUME_PENDING", began)]
    assert machine.said() == ["in time"]


# ----- afterwards


@pytest.mark.parametrize("end", ["answers", "fails", "is stopped"])
async def test_a_turn_that_is_over_leaves_nothing_to_the_collector(
    machine: Machine, autojump_clock: MockClock, end: str
) -> None:
    """A busy process asks its collector rarely; until then a circle keeps all of its objects."""
    turns: list[weakref.ref[Turn]] = []

    async def think() -> str:
        return "a thought"

    async def agent(turn: Turn) -> str:
        turns.append(weakref.ref(turn))
        await turn.step(think)
        await turn.step(think, effect="unsafe")
        await turn.checkpoint({"so": "far"})
        await turn.say("on it")
        await turn.history()
        if end == "fails":
            raise ValueError(turn.text)
        if end == "is stopped":
            await trio.sleep_forever()
        return "done"

    async with machine.boot(agent) as gateway:
        gc.collect()
        gc.disable()
        try:
            for number in range(5):
                await gateway.accept(msg("a", f"m{number}"))
                await trio.sleep(1)
                await gateway.accept(msg("a", f"s{number}", "/stop"))
                await gateway.wait_idle()
            await trio.sleep(1)
            left = sum(turn() is not None for turn in turns)
        finally:
            gc.enable()
    assert len(turns) == 5
    assert left <= 1  # the last one may still be in somebody's hands


# ----- checkpoints


@attrs.frozen
class Plan:
    """What an agent keeps."""

    goal: str
    tries: int = 0
    parts: tuple[str, ...] = ()


@pytest.mark.parametrize("crash", [False, True])
async def test_checkpoints_are_found_by_the_next_attempt(
    machine: Machine, autojump_clock: MockClock, crash: bool
) -> None:
    """The last one counts; in its own attempt, too; as JSON values."""
    seen: list[object] = []

    async def agent(turn: Turn) -> str:
        seen.append(turn.checkpointed)
        if turn.resumed is None:
            await turn.checkpoint({"page": 1})
            await turn.checkpoint([1, 2.5, None, "x", {"y": True}])
            seen.append(turn.checkpointed)
            await trio.sleep_forever()
        await turn.checkpoint(Plan("win", 3, ("a", "b")))
        return str(turn.checkpointed)

    await interrupted(machine, agent, crash=crash)
    assert await resumed(machine, agent) == ["{'goal': 'win', 'tries': 3, 'parts': ['a', 'b']}"]
    assert seen == [None, [1, 2.5, None, "x", {"y": True}], [1, 2.5, None, "x", {"y": True}]]


async def test_p14_a_checkpoint_that_cannot_be_stored(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """A clear error; the earlier one stays."""
    errors: list[str] = []

    async def agent(turn: Turn) -> str:
        await turn.checkpoint(1)
        try:
            await turn.checkpoint(object())
        except StepNotStorable as error:
            errors.append(str(error))
        return str(turn.checkpointed)

    (reply,) = await once(machine, agent)
    assert reply.text == "1"
    assert "the checkpoint is 'object' and cannot be stored" in errors[0]


# ----- steps


@pytest.mark.parametrize("crash", [False, True])
@pytest.mark.parametrize("effect", ["safe", "idempotent", "unsafe"])
async def test_p08_a_finished_step_is_not_executed_again(
    machine: Machine, autojump_clock: MockClock, effect: str, crash: bool
) -> None:
    """Its result comes from the store, in every later attempt."""
    done: list[int] = []

    async def think(n: int) -> int:
        done.append(n)
        return n * 2

    async def agent(turn: Turn) -> str:
        total = [await turn.step(think, n, effect=effect) for n in range(3)]
        if turn.resumed is None:
            await trio.sleep_forever()
        return str(total)

    await interrupted(machine, agent, crash=crash)
    assert await resumed(machine, agent) == ["[0, 2, 4]"]
    assert done == [0, 1, 2]
    assert [e.name for e in machine.log.of(StepRemembered)] == [
        f"test_p08_a_finished_step_is_not_executed_again.think{n}" for n in ("", "#2", "#3")
    ]


@pytest.mark.parametrize("crash", [False, True])
@pytest.mark.parametrize(
    ("effect", "expected"), [("safe", "did it"), ("idempotent", "did it"), ("unsafe", "in doubt")]
)
async def test_p08_a_step_that_was_cut(
    machine: Machine, autojump_clock: MockClock, effect: str, expected: str, crash: bool
) -> None:
    """Done again where that was declared harmless; else the turn learns that it is in doubt."""
    tries: list[str] = []

    async def charge(key: str) -> str:
        tries.append(key)
        if len(tries) == 1:
            await trio.sleep_forever()
        return "did it"

    async def agent(turn: Turn) -> str:
        key = turn.idempotency_key("charge")
        try:
            return await turn.step(charge, key, name="charge", effect=effect)
        except StepInDoubt as doubt:
            return f"in doubt: {doubt.name}"

    await interrupted(machine, agent, crash=crash)
    (said,) = await resumed(machine, agent)
    assert said.startswith(expected)
    assert len(tries) == (1 if effect == "unsafe" else 2)
    assert len(set(tries)) == 1


async def test_p08_a_doubt_that_nobody_handles_fails_the_turn_and_names_the_step(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Also out of a nursery of the agent's; and /retry does not forget it."""

    async def pay() -> None:
        await trio.sleep_forever()

    async def agent(turn: Turn) -> str:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(turn.step, pay, name="pay the bill", effect="unsafe"))
        return "paid"

    await interrupted(machine, agent, crash=True)
    (said,) = await resumed(machine, agent)
    assert "'pay the bill'" in said
    assert "cannot tell whether it happened" in said
    assert machine.fate("m1") == "failed"
    async with machine.boot(agent) as gateway:
        await gateway.ask(msg("a", "c1", "/retry"))
        await gateway.wait_idle()
    assert machine.said()[-1] == said


async def test_p08_an_unsafe_step_that_raised_is_in_doubt_too(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """An error out of it does not say whether it happened; in the same attempt it passes through,
    and trying again is another step."""
    tries = 0

    async def charge() -> str:
        nonlocal tries
        tries += 1
        if tries < 2:
            raise ConnectionError("lost the line")
        return "charged"

    async def agent(turn: Turn) -> str:
        try:
            await turn.step(charge, effect="unsafe")
        except ConnectionError:
            await turn.step(charge, effect="unsafe")
        except StepInDoubt:
            return "in doubt"
        if turn.resumed is None:
            await trio.sleep_forever()
        return "charged"

    await interrupted(machine, agent)
    assert await resumed(machine, agent) == ["in doubt"]
    assert tries == 2


async def test_p08_a_step_is_remembered_although_the_turn_is_cancelled_meanwhile(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """It finishes at the very moment of the cancellation: what was done is known."""
    done = 0

    async def deaf() -> str:
        nonlocal done
        with trio.CancelScope(shield=True):
            await trio.sleep(12)
        done += 1
        return "done"

    async def agent(turn: Turn) -> str:
        return await turn.step(deaf, effect="unsafe")

    settings = Settings(grace=1.0, budget=60.0)
    async with machine.boot(agent, settings=settings) as gateway:
        await gateway.accept(msg("a", "m1"))
        await trio.sleep(10)
    async with machine.boot(agent) as gateway:
        await gateway.wait_idle()
    assert machine.said() == ["done"]
    assert done == 1


@attrs.frozen
class Address:
    """A part of a result."""

    street: str
    number: int | None = None


@attrs.frozen
class Person:
    """A result with parts."""

    name: str
    homes: tuple[Address, ...]
    ages: dict[str, int]


def as_person() -> Person:
    return Person("Ada", (Address("Main", 1), Address("Side")), {"now": 36})


async def as_person_async() -> Person:
    return as_person()


def as_list() -> list[tuple[int, str]]:
    return [(1, "a"), (2, "b")]


def as_set() -> frozenset[str]:
    return frozenset("abc")


def as_bytes() -> bytes:
    return b"\x00\xff"


def as_nothing() -> None:
    return None


def as_optional() -> Person | None:
    return as_person()


class Maker:
    """Makes things."""

    def __call__(self) -> Address:
        return Address("Made")

    def make(self) -> Address:
        return Address("Made")


@pytest.mark.parametrize(
    "fn",
    [
        as_person,
        as_person_async,
        as_list,
        as_set,
        as_bytes,
        as_nothing,
        as_optional,
        Maker(),
        Maker().make,
        partial(Address, "Partial", 4),
        partial(partial(as_person)),
    ],
    ids=default_name,
)
async def test_p08_what_a_step_returns_reads_back_the_same(
    tmp_path: Path, fn: Callable[[], Any]
) -> None:
    """attrs classes, nested and optional; tuples, sets, bytes; the first time and every time."""
    seen: list[object] = []
    ready = trio.Event()

    async def agent(turn: Turn) -> str:
        seen.append(await turn.step(fn))
        ready.set()
        if turn.resumed is None:
            await trio.sleep_forever()
        return "done"

    store = tmp_path / "gateway.db"
    with trio.fail_after(PATIENCE):
        async with open_gateway(agent, store=store, settings=Settings(grace=0.0)) as gateway:
            await gateway.accept(msg("a", "m1"))
            await ready.wait()
        async with open_gateway(agent, store=store) as gateway:
            await gateway.ask(msg("a", "m1"))
    direct = fn()
    expected = await direct if hasattr(direct, "__await__") else direct
    assert seen == [expected, expected]
    assert type(seen[0]) is type(seen[1]) is type(expected)


class Opaque:
    """Cannot be stored."""


def as_opaque() -> Opaque:
    return Opaque()


def unannotated():  # type: ignore[no-untyped-def]
    return 1j


def misannotated() -> int:
    return "not a number"  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("fn", "says"),
    [
        (as_opaque, "the result of step 'as_opaque' is 'Opaque' and cannot be stored"),
        (unannotated, "the result of step 'unannotated' is 'complex' and cannot be stored"),
        (misannotated, "the result of step 'misannotated' does not read back as 'int'"),
    ],
)
async def test_p14_a_result_that_cannot_be_stored_is_a_clear_error(
    tmp_path: Path, fn: Callable[[], Any], says: str
) -> None:
    """It names the step, the type and what to do."""
    errors: list[StepNotStorable] = []

    async def agent(turn: Turn) -> str:
        try:
            await turn.step(fn)
        except StepNotStorable as error:
            errors.append(error)
        return "done"

    with trio.fail_after(PATIENCE):
        async with open_gateway(agent, store=tmp_path / "gateway.db") as gateway:
            await gateway.ask(msg("a", "m1"))
    (error,) = errors
    assert says in str(error)
    assert ":" in str(error)
    assert isinstance(error, TypeError | AgentMisuse)


async def test_steps_have_names_of_their_own(machine: Machine, autojump_clock: MockClock) -> None:
    """Two steps never share a result, however they are named."""

    async def say(text: str) -> str:
        return text

    async def agent(turn: Turn) -> str:
        said = [
            await turn.step(say, "1", name="x"),
            await turn.step(say, "2", name="x"),
            await turn.step(say, "3", name="x#2"),
            await turn.step(say, "4", name="x"),
            await turn.step(say, "5", name="x#2"),
            await turn.step(say, "6", name="x#3"),
            await turn.step(say, "7"),
            await turn.step(say, "8"),
        ]
        if turn.resumed is None:
            await trio.sleep_forever()
        return "".join(said)

    await interrupted(machine, agent)
    assert await resumed(machine, agent) == ["12345678"]
    assert machine.rows("SELECT count(*) FROM step") == [(8,)]


async def test_a_step_that_raises_is_not_remembered(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Its error passes through; the next attempt does it."""
    tries = 0

    async def think() -> str:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise ConnectionError("lost the line")
        return "thought"

    async def agent(turn: Turn) -> str:
        try:
            return await turn.step(think)
        except ConnectionError:
            await trio.sleep_forever()
            raise

    await interrupted(machine, agent)
    assert await resumed(machine, agent) == ["thought"]
    assert tries == 2


@pytest.mark.parametrize("wrong", ["Safe", "", "exactly-once"])
async def test_p14_an_effect_with_a_typo(
    machine: Machine, autojump_clock: MockClock, wrong: str
) -> None:
    """Named, with what is expected; nothing runs."""
    errors: list[str] = []

    async def agent(turn: Turn) -> str:
        try:
            await turn.step(pytest.fail, "ran", effect=wrong)
        except AgentMisuse as error:
            errors.append(str(error))
        return "done"

    await once(machine, agent)
    assert errors == [f"effect={wrong!r}: expected 'safe', 'idempotent' or 'unsafe'"]


async def test_a_plain_step_runs_in_a_thread(tmp_path: Path) -> None:
    """And a cancellation does not wait for it."""
    hang = threading.Event()
    inside = threading.Event()

    def think() -> str:
        inside.set()
        hang.wait(PATIENCE)
        return threading.current_thread().name

    async def agent(turn: Turn) -> str:
        return await turn.step(think)

    try:
        with trio.fail_after(PATIENCE):
            async with open_gateway(
                agent, store=tmp_path / "gateway.db", settings=Settings(grace=0.05)
            ) as gateway:
                await gateway.accept(msg("a", "m1"))
                await trio.to_thread.run_sync(inside.wait)
            assert gateway.report is not None
            assert len(gateway.report.interrupted) == 1
    finally:
        hang.set()


async def test_p08_steps_survive_a_disk_that_is_full_for_a_while(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """The write is tried until it works: the agent waits, and the step is done once."""
    done = 0
    full = True

    async def think() -> str:
        nonlocal done
        done += 1
        return "thought"

    def fail(moment: str) -> None:
        if full:
            raise apsw.FullError("full")

    async def agent(turn: Turn) -> str:
        machine.on_commit = fail
        return await turn.step(think)

    async with machine.boot(agent) as gateway:
        await gateway.accept(msg("a", "m1"))
        await machine.log.wait_for(StoreTrouble, 2)
        full = False
        await gateway.wait_idle()
    assert (machine.said(), done) == (["thought"], 1)


async def test_idempotency_keys_are_stable_and_distinct(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """The same in every attempt; different for other names, turns and stores."""
    keys: list[tuple[int, str, str]] = []

    async def agent(turn: Turn) -> str:
        for name in ("pay", "mail"):
            keys.append((turn.id, name, turn.idempotency_key(name)))
        if turn.attempt == 1 and turn.session.name == "a":
            await trio.sleep_forever()
        return "done"

    await interrupted(machine, agent)
    async with machine.boot(agent) as gateway:
        await gateway.ask(msg("b", "m2"))
        await gateway.wait_idle()
    assert len(keys) == 6
    assert len(set(keys)) == len({key for _, _, key in keys}) == 4
    other = Machine(machine.store.parent / "other")
    other.store.parent.mkdir()
    await once(other, agent_of_one_key(keys))
    assert len({key for _, _, key in keys}) == 5


def agent_of_one_key(keys: list[tuple[int, str, str]]) -> AsyncAgent:
    """An agent that notes one key."""

    async def agent(turn: Turn) -> str:
        keys.append((turn.id, "pay", turn.idempotency_key("pay")))
        return "done"

    return agent


# ----- asking for a restart


async def test_p13_whoever_asks_for_a_restart_settles_first(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """The drain does not begin before; then everybody else is interrupted, with reason restart."""
    other = Script()

    async def agent(turn: Turn) -> str:
        if turn.session.name == "asks":
            turn.request_restart()
            turn.request_restart()
            await trio.sleep(5)
            assert not turn.draining.value
            return "restarting"
        return await other(turn)

    async with machine.boot(agent, settings=Settings(grace=8.0)) as gateway:
        await gateway.accept(msg("other", "m1"))
        began = trio.current_time()
        await gateway.accept(msg("asks", "m2"))
        await gateway.wait_stop_requested()
        assert trio.current_time() - began == pytest.approx(5.0)
        assert machine.fate("m2") == "answered"
        assert gateway.stop_reason is ResumeReason.RESTART
    assert machine.markers() == {"other": ("RESUME_PENDING", "restart")}
    (requested,) = machine.log.of(StopRequested)
    assert requested.by.startswith("turn ")


async def test_p13_whoever_asks_and_never_ends_gets_a_window(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """A restart is not held up for ever by the turn that asked for it."""

    async def agent(turn: Turn) -> str:
        if turn.resumed is None:
            turn.request_restart()
            await trio.sleep_forever()
        return "done"

    async with machine.boot(agent, settings=Settings(grace=8.0)) as gateway:
        began = trio.current_time()
        await gateway.accept(msg("a", "m1"))
        await gateway.wait_stop_requested()
        assert trio.current_time() - began == pytest.approx(8.0)
    assert await resumed(machine, agent) == ["done"]


@pytest.mark.parametrize("crash", [False, True])
async def test_c31_a_resumed_turn_does_not_ask_again(
    machine: Machine, autojump_clock: MockClock, crash: bool
) -> None:
    """Interrupted or killed after it asked: the next attempt asks in vain, and settles."""

    async def agent(turn: Turn) -> str:
        turn.request_restart()
        if turn.resumed is None:
            await trio.sleep_forever()
        return "done"

    async with machine.boot(agent, settings=Settings(grace=30.0)) as gateway:
        await gateway.accept(msg("a", "m1"))
        await trio.sleep(10)
        if crash:
            machine.crash()
        gateway.request_stop(now=True)
    async with machine.boot(agent) as gateway:
        await gateway.wait_idle()
        await trio.sleep(600)
        assert gateway.stop_reason is None
    assert machine.said() == ["done"]


async def test_p13_asking_in_the_drain_is_no_error(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """The gateway stops already: the turn goes on and settles, and the first reason stays."""

    async def agent(turn: Turn) -> str:
        await turn.draining.wait_value(True)
        turn.request_restart()
        return "asked"

    async with machine.boot(agent) as gateway:
        await gateway.accept(msg("a", "m1"))
        await trio.sleep(1)
        gateway.request_stop()
    assert machine.said() == ["asked"]
    assert gateway.stop_reason is ResumeReason.SHUTDOWN
    assert gateway.failure is None


async def test_a_turn_in_real_time_over_the_thread(tmp_path: Path) -> None:
    """The whole of it once without virtual time: steps, say, checkpoint, history, over a kill that
    copies the files while the store's own thread writes."""
    log = Log()
    store = tmp_path / "gateway.db"

    async def think(n: int) -> int:
        return n * n

    async def agent(turn: Turn) -> str:
        results = [await turn.step(think, n) for n in range(5)]
        await turn.say(f"{len(await turn.history())} lines")
        await turn.checkpoint(results)
        return str(sum(turn.checkpointed))

    with trio.fail_after(PATIENCE):
        async with open_gateway(agent, store=store, listen=log) as gateway:
            async with trio.open_nursery() as nursery:
                for n in range(40):
                    nursery.start_soon(gateway.ask, msg(f"s{n % 10}", f"m{n}"))
            await gateway.wait_idle()
            settled_well(gateway)
    assert len(log.of(TurnSettled)) == 40
    assert {event.state for event in log.of(TurnSettled)} == {TurnState.COMPLETED}
    assert len(log.of(StepRemembered)) == 200
