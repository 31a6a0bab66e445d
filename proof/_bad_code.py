"""What other people's code does: agents, channels, and the hook that authorises.

    agents      return, raise, say, remember and ask for odd things: their turn ends, visibly
    channels    raise odd things from `send` and `serve`, hand in garbage, ask to wait for ever:
                every delivery arrives or is a dead letter
    hooks       raise, or answer with what is no answer: that means no

Beside each of them healthy sessions, and a healthy channel, are served.
"""

from __future__ import annotations

import asyncio
import decimal
import math
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Final

import attrs
import trio
from hypothesis import strategies as st

from trio_gateway import (
    ConfigError,
    Delivery,
    GatewayError,
    Intake,
    Message,
    ReceiptStatus,
    RetryLater,
    StepInDoubt,
    Turn,
    Undeliverable,
)
from trio_gateway._errors import StoreClosed, StoreCorrupt, StoreFull
from trio_gateway._events import ChannelFailed
from trio_gateway._policy import DeliveryRules
from trio_gateway.testing import MemoryChannel

from ._bad_lives import (
    PLAIN,
    Batch,
    Ears,
    control,
    echo,
    hosted,
    in_virtual_time,
    rows,
    sound,
    story,
    whole,
)
from ._inputs import Strategy, drawn, json_value, odd_text, odd_value

# ----- odd errors


class Mute(Exception):
    """Cannot say what it is."""

    def __str__(self) -> str:
        raise RuntimeError("no words")

    __repr__ = __str__


class Wordless(Exception):
    """Says something that is no text."""

    def __str__(self) -> str:
        none: Any = None
        return none  # type: ignore[no-any-return]

    __repr__ = __str__


class Bare(BaseException):
    """No `Exception`."""


class Doubt(StepInDoubt):
    """Made without its name."""

    def __init__(self) -> None:
        Exception.__init__(self, "doubt")


class Hasty(RetryLater):
    """Made without its time."""

    def __init__(self) -> None:
        Exception.__init__(self, "later")


def _later(after: Any) -> Callable[[], BaseException]:
    return lambda: RetryLater(after)


def _circle() -> BaseException:
    error = ValueError("round")
    other = KeyError("and round")
    error.__cause__, other.__cause__ = other, error
    return error


def _noted() -> BaseException:
    error = ValueError("noted")
    notes: Any = 5
    error.__notes__ = notes
    return error


def _nested() -> BaseException:
    inner = BaseExceptionGroup("inner", [Bare("bare"), Mute()])
    return BaseExceptionGroup("outer", [inner, SystemExit(3), ValueError("\ud800")])


SHOWABLE: Final[tuple[Callable[[], BaseException], ...]] = (
    Doubt, _circle, _noted,
    lambda: ValueError("\ud800"),
    lambda: ValueError("a\nb\0c\x1b[2J"),
    lambda: ValueError("x" * 1_000_000),
    lambda: ValueError(b"\xff", 7, object()),
    lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no"),
    lambda: OSError(28, "No space left"),
    lambda: RecursionError("deep"), lambda: StopAsyncIteration(1), lambda: StopIteration(1),
    MemoryError, trio.TooSlowError, trio.ClosedResourceError, asyncio.CancelledError, GatewayError,
    lambda: StoreFull("mine"), lambda: StoreCorrupt("mine"), lambda: StoreClosed("mine"),
    lambda: ConfigError("mine"), lambda: StepInDoubt("\ud800"),
    lambda: SystemExit(0), lambda: SystemExit("x"), lambda: Bare("bare"),
    lambda: BaseExceptionGroup("bare", [Bare("bare"), SystemExit(3), ValueError("\ud800")]),
    lambda: ExceptionGroup("\udfff", [ExceptionGroup("in one", [KeyError("\udfff")])]),
)  # fmt: skip
"""Raised by agents, channels and hooks alike."""

ANYWHERE: Final[tuple[Callable[[], BaseException], ...]] = (
    *SHOWABLE, Mute, Wordless, _nested,
    lambda: ExceptionGroup("one", [ExceptionGroup("in one", [Wordless()])]),
)  # fmt: skip
"""The same, and what not even Trio can show: in a nursery of its own, that is the end of Trio."""

FROM_SEND: Final[tuple[Callable[[], BaseException], ...]] = (
    *ANYWHERE, Hasty,
    *map(_later, (0, -1, math.nan, math.inf, -math.inf, 1e308, 10**400, True, 3600)),
    *map(_later, ("5", None, decimal.Decimal("2.5"), decimal.Decimal("NaN"), 1j, [])),
    lambda: ExceptionGroup("later", [RetryLater(1.0)]),
    lambda: RetryLater(1.0, "\ud800"), lambda: RetryLater(1.0, "x" * 100_000),
    Undeliverable, lambda: Undeliverable("\ud800"), lambda: Undeliverable(b"\xff", 7),
    lambda: Undeliverable("x" * 100_000), lambda: ExceptionGroup("gone", [Undeliverable("gone")]),
)  # fmt: skip

# ----- agents

Deed = Callable[["Stage", Turn, Any], Awaitable[Any]]


@attrs.define
class Stage:
    """Where agents act: what they were told to do, and what came of it."""

    batch: Batch
    ends: dict[str, str] = attrs.field(factory=dict[str, str])
    """How the turn of each message must end."""
    wrong: list[str] = attrs.field(factory=list[str])
    kept: list[Turn] = attrs.field(factory=list[Turn])
    """Turns that somebody kept when they were over."""

    async def use(self, call: Awaitable[Any]) -> Any:
        """Use the turn. What is refused is refused in words of ours, or as a wrong type."""
        try:
            return await call
        except (GatewayError, TypeError) as error:
            self.batch.error(error)
            raise
        except Exception as error:
            self.wrong.append(story(error))
            raise


async def _returns(stage: Stage, turn: Turn, value: Any) -> Any:
    return value


async def _raises(stage: Stage, turn: Turn, value: Any) -> Any:
    raise stage.batch.dice.choice(ANYWHERE)()


async def _raises_in_nursery(stage: Stage, turn: Turn, value: Any) -> Any:
    async def fall() -> None:
        raise stage.batch.dice.choice(SHOWABLE)()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fall)
        nursery.start_soon(trio.sleep_forever)
        nursery.start_soon(fall)


async def _cancels_itself(stage: Stage, turn: Turn, value: Any) -> Any:
    with trio.CancelScope() as scope:
        scope.cancel()
        await turn.say("never")
    return "still here"


async def _says(stage: Stage, turn: Turn, value: Any) -> Any:
    await stage.use(turn.say(value))
    return "said"


async def _steps(stage: Stage, turn: Turn, value: Any) -> Any:
    async def step() -> Any:
        await trio.lowlevel.checkpoint()
        return value

    await stage.use(turn.step(step))
    return "stepped"


async def _steps_round(stage: Stage, turn: Turn, value: Any) -> Any:
    async def step() -> Any:
        circle: list[Any] = [value]
        circle.append(circle)
        return circle

    await stage.use(turn.step(step))


async def _steps_deep(stage: Stage, turn: Turn, value: Any) -> Any:
    async def step() -> Any:
        deep: Any = value
        for _ in range(stage.batch.dice.choice((100, 500, 50_000))):
            deep = [deep]
        return deep

    await stage.use(turn.step(step))
    return "stepped"


async def _steps_otherwise(stage: Stage, turn: Turn, value: Any) -> Any:
    async def step() -> int:
        return value  # type: ignore[no-any-return]

    await stage.use(turn.step(step))
    return "stepped"


async def _names_steps(stage: Stage, turn: Turn, value: Any) -> Any:
    await stage.use(turn.step(_nothing, name=value))
    return "stepped"


async def _has_effects(stage: Stage, turn: Turn, value: Any) -> Any:
    await stage.use(turn.step(_nothing, effect=value))
    return "stepped"


async def _fails_in_step(stage: Stage, turn: Turn, value: Any) -> Any:
    async def step() -> Any:
        raise stage.batch.dice.choice(ANYWHERE)()

    await turn.step(step)


async def _nothing() -> None:
    await trio.lowlevel.checkpoint()


async def _checkpoints(stage: Stage, turn: Turn, value: Any) -> Any:
    await stage.use(turn.checkpoint(value))
    assert turn.checkpointed is not turn
    return "kept"


async def _shows(stage: Stage, turn: Turn, value: Any) -> Any:
    turn.progress(value)
    return "shown"


async def _looks_back(stage: Stage, turn: Turn, value: Any) -> Any:
    await stage.use(turn.history(value))
    return "looked"


async def _asks_for_keys(stage: Stage, turn: Turn, value: Any) -> Any:
    turn.idempotency_key(value)
    turn.arrivals()
    return "never"


async def _keeps_its_turn(stage: Stage, turn: Turn, value: Any) -> Any:
    stage.kept.append(turn)
    return "kept"


DEEDS: Final[tuple[Deed, ...]] = (
    _returns, _returns, _raises, _raises, _raises_in_nursery, _cancels_itself, _says, _steps,
    _steps_round, _steps_deep, _steps_otherwise, _names_steps, _has_effects, _fails_in_step,
    _checkpoints, _shows, _looks_back, _asks_for_keys, _keeps_its_turn,
)  # fmt: skip


def agents(batch: Batch) -> None:
    """Hundreds of turns that misbehave, each in its own way."""
    stage = Stage(batch)
    values = drawn(st.one_of(odd_value, odd_text, json_value), batch.size, batch.draw_seed())
    in_virtual_time(partial(_agents_life, stage, values))
    assert not stage.wrong, stage.wrong[0]
    fates = dict(rows(batch.store, "SELECT id, state FROM message"))
    for id, end in stage.ends.items():
        assert fates[id] == end, f"{id} should have ended {end}, and is {fates[id]}"
        batch.input(end)
        batch.seen["a turn that failed alone"] += end == "failed"
    for id, fate in fates.items():
        assert fate == "answered" or id in stage.ends, f"{id}, which was healthy, is {fate}"
    sound(batch)


async def _agents_life(stage: Stage, values: Sequence[Any]) -> None:
    batch = stage.batch
    deeds = {f"m{n}": (batch.dice.choice(DEEDS), value) for n, value in enumerate(values)}

    async def agent(turn: Turn) -> Any:
        if turn.message.id not in deeds:
            return await echo(turn)
        deed, value = deeds[turn.message.id]
        stage.ends[turn.message.id] = "failed"
        told = await deed(stage, turn, value)
        if told is None or isinstance(told, str):
            stage.ends[turn.message.id] = "answered"
        return told

    channel = MemoryChannel("chat")
    async with hosted(batch, agent, channel) as gateway:
        for n, id in enumerate(deeds):
            await channel.receive(f"s{n % 11}", id, "hi")
            if n % 20 == 0:
                await control(gateway, f"control-{n}")
        await whole(batch, gateway)
        await _use_when_over(stage)


async def _use_when_over(stage: Stage) -> None:
    """A turn that is over takes nothing any more, and says so."""
    for turn in stage.kept:
        for call in (turn.say("late"), turn.checkpoint(1), turn.step(_nothing)):
            try:
                await stage.use(call)
            except GatewayError:
                continue
            stage.wrong.append(f"{turn} was over, and took something")
        turn.progress("late")


# ----- channels

GARBAGE: Final[Strategy[Any]] = st.one_of(odd_value, odd_text)

_PATIENT: Final = attrs.evolve(
    PLAIN, delivery=DeliveryRules(max_tries=5, first_delay=1.0, max_delay=60.0, timeout=30.0)
)


class OddChannel(MemoryChannel):
    """Its `send` does, for each session in turn, what it was told to; in the end it sends."""

    def __init__(self, batch: Batch, garbage: Sequence[Any], *, idempotent: bool) -> None:
        super().__init__("odd", idempotent=idempotent, text_limit=batch.dice.choice((None, 5)))
        self._batch = batch
        self._garbage = list(garbage)
        self._troubles: dict[str, list[Callable[[], Awaitable[Any]]]] = {}
        self._serves = 6

    async def send(self, delivery: Delivery) -> Any:
        """See `Channel.send`; what it returns is nobody's business."""
        name = delivery.session.name
        troubles = self._troubles.setdefault(name, self._plan())
        if not troubles:
            return await super().send(delivery)
        answer = await troubles.pop()()
        self.sent.append(delivery)
        return answer

    def _plan(self) -> list[Callable[[], Awaitable[Any]]]:
        dice = self._batch.dice
        return [
            dice.choice((self._falls, self._falls, self._falls, self._hangs, self._answers))
            for _ in range(dice.choice((1, 2, 6)))
        ]

    async def _falls(self) -> Any:
        await trio.lowlevel.checkpoint()
        raise self._batch.dice.choice(FROM_SEND)()

    async def _hangs(self) -> Any:
        await trio.sleep_forever()

    async def _answers(self) -> Any:
        await trio.lowlevel.checkpoint()
        return self._batch.dice.choice(self._garbage)

    def progress(self, session: str, text: str) -> None:
        """See `Channel.progress`."""
        raise self._batch.dice.choice(ANYWHERE)()

    def text_length(self, text: str) -> int:
        """See `Channel.text_length`: a count that sometimes cannot be had."""
        if self._batch.dice.random() < 0.1:
            raise self._batch.dice.choice(ANYWHERE)()
        return len(text)

    async def serve(self, intake: Intake, *, task_status: trio.TaskStatus[None]) -> None:
        """See `Channel.serve`: falls over a few times, in odd ways, before it serves."""
        if self._serves:
            self._serves -= 1
            if self._serves % 2:
                task_status.started()
                task_status.started()
            await self._hand_in_garbage(intake)
            raise self._batch.dice.choice(ANYWHERE)()
        await super().serve(intake, task_status=task_status)

    async def _hand_in_garbage(self, intake: Intake) -> None:
        take, thing = intake, self._batch.dice.choice(self._garbage)
        wrong = Message(session="a", id="wrong", text="x", channel="chat")
        good = Message(session="a", id="good", text="x", channel="odd")
        calls: tuple[Callable[[], Awaitable[object]], ...] = (
            lambda: take.accept(thing),
            lambda: take.accept(wrong),
            lambda: take.accept(good, thing),
            lambda: take.accept(good, cursor=thing),
            lambda: take.history(thing, 5),
            lambda: take.history("a", thing),
            take.cursor,
        )
        for call in calls:
            try:
                await call()
            except GatewayError as error:
                self._batch.error(error)
            self._batch.input("garbage")
        take.refused_input(thing, thing)


def channels(batch: Batch) -> None:
    """A channel that misbehaves in every way beside one that does not."""
    garbage = drawn(GARBAGE, 40, batch.draw_seed())
    in_virtual_time(partial(_channels_life, batch, garbage))
    fates = dict(rows(batch.store, "SELECT key, state FROM delivery"))
    for key, state in fates.items():
        assert state in ("delivered", "dead"), f"{key} is {state}"
    sent = rows(
        batch.store,
        "SELECT delivery.state FROM delivery JOIN session ON session.id = delivery.session"
        " WHERE session.channel = 'odd'",
    )
    for (state,) in sent:
        batch.input(state)
        batch.seen["a dead letter"] += state == "dead"
    sound(batch)
    if batch.number == 0:
        in_virtual_time(partial(_unusable_channels, batch))


async def _channels_life(batch: Batch, garbage: Sequence[Any]) -> None:
    async def agent(turn: Turn) -> str:
        if turn.session.channel == "odd":
            turn.progress("working")
        return await echo(turn)

    odd = OddChannel(batch, garbage, idempotent=batch.dice.random() < 0.5)
    fine = MemoryChannel("fine")
    ears = Ears()
    async with hosted(batch, agent, odd, fine, settings=_PATIENT, ears=ears) as gateway:
        for n in range(batch.size):
            receipt = await odd.receive(f"s{n}", f"m{n}", "a longer text")
            assert receipt.status is ReceiptStatus.ACCEPTED, receipt
            if n % 10 == 0:
                await fine.receive("a", f"fine-{n}", "hi")
                await control(gateway, f"control-{n}")
        await whole(batch, gateway, _PATIENT)
    assert fine.texts() == ["re: hi"] * len(range(0, batch.size, 10)), fine.texts()
    assert ears.of(ChannelFailed), "the odd channel never failed"
    assert all(event.channel == "odd" for event in ears.of(ChannelFailed))


async def _unusable_channels(batch: Batch) -> None:
    """What no gateway can use is refused at once, in words that name the class."""
    for name in ("", "A", "local", "a b", 5, None, "x" * 33, "\ud800"):
        await _is_refused(batch, _made(name=name), "name")
    limits: tuple[Any, ...] = (0, -1, "5", 1.5, math.nan, [], True)
    for limit in limits:
        await _is_refused(batch, _made(text_limit=limit), "text_limit")


def _made(**fields: Any) -> MemoryChannel:
    channel = MemoryChannel("fine")
    for name, value in fields.items():
        setattr(channel, name, value)
    return channel


async def _is_refused(batch: Batch, channel: MemoryChannel, what: str) -> None:
    try:
        async with hosted(batch, echo, channel):
            pass
    except ConfigError as error:
        if f"MemoryChannel.{what}" not in str(error):
            raise AssertionError(f"what is it about? {error}") from error
        batch.error(error)
        batch.input("refused")
    else:
        raise AssertionError(f"{what}={getattr(channel, what)!r} was taken")


# ----- the hook that authorises


class _Torn:
    """Neither true nor false."""

    def __bool__(self) -> bool:
        raise RuntimeError("torn")


def hooks(batch: Batch) -> None:
    """An authorisation that fails, or answers with anything: only what is true is a yes. Asked
    for new messages, and at the boot, for turns that were interrupted."""
    answers = [*drawn(GARBAGE, batch.size, batch.draw_seed()), _Torn(), True, False]
    in_virtual_time(partial(_hooks_life, batch, answers))
    in_virtual_time(partial(_hooks_boot, batch, answers))
    left = rows(batch.store, "SELECT id, state FROM message WHERE state IN ('queued', 'running')")
    assert not left, left
    sound(batch)


def _hook(batch: Batch, answers: Sequence[Any], fair: set[str]) -> Any:
    async def authorize(message: Message) -> Any:
        await trio.lowlevel.checkpoint()
        if message.id in fair or message.session == "control":
            return True
        if batch.dice.random() < 0.5:
            raise batch.dice.choice(ANYWHERE)()
        return batch.dice.choice(answers)

    return authorize


async def _hooks_life(batch: Batch, answers: Sequence[Any]) -> None:
    fair = {f"m{n}" for n in range(0, batch.size, 5)}

    async def agent(turn: Turn) -> str:
        if turn.message.id in fair:
            await trio.sleep_forever()
        return await echo(turn)

    settings = attrs.evolve(PLAIN, grace=0.1, limits=attrs.evolve(PLAIN.limits, turns=10_000))
    hook = _hook(batch, answers, fair)
    async with hosted(batch, agent, settings=settings, authorize=hook) as gateway:
        for n in range(batch.size):
            receipt = await gateway.accept(Message(session=f"s{n}", id=f"m{n}", text="hi"))
            assert receipt.accepted or receipt.reason == "not allowed", receipt
            batch.input("let in" if receipt.accepted else "kept out")
            if n % 10 == 0:
                await control(gateway, f"control-{n}")
        await trio.sleep(1)


async def _hooks_boot(batch: Batch, answers: Sequence[Any]) -> None:
    hook = _hook(batch, answers, set())
    async with hosted(batch, echo, authorize=hook) as gateway:
        await control(gateway, "after the boot")
        await gateway.wait_idle()
    ends = rows(batch.store, "SELECT state, count(*) FROM turn WHERE attempt + crashes"
                " + interruptions > 1 GROUP BY state")  # fmt: skip
    for state, count in ends:
        batch.input(f"resumed {state}", count)
        aside = count if state == "QUARANTINED" else 0
        batch.seen["a turn put aside because it was not allowed any more"] += aside
