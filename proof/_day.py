"""A day of a gateway whose disk is not to be trusted: a bit of everything that it does.

    morning     it boots, and people write to it: steps, what is said in parts, a queue, a /stop,
                a platform that knows its keys and one that does not
    evening     it is stopped: one turn settles in the drain, one does not, and one more message
                comes in meanwhile
    next day    it boots again, and everything comes to its end

People send each message until it is accepted, as a platform does, and never again after that: what
was accepted and is lost is not mended by them. What happens outside is noted in the world.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final, TypeAlias

import attrs
import trio

from trio_gateway import (
    Event,
    Gateway,
    Limits,
    ReceiptStatus,
    ResumeRules,
    Settings,
    StepInDoubt,
    StoreError,
    Turn,
)
from trio_gateway._events import (
    Delivered,
    GatewayFailed,
    GatewayStarted,
    MarkingFailed,
    ReplyCommitted,
    SettleDelayed,
    StepRemembered,
    StoreTrouble,
    TurnBegun,
    TurnSettled,
    TurnsMarked,
)
from trio_gateway.testing import GatewayOpener, SurvivingChannel, World, check_invariants

from ._worlds import exactly_the_interrupted_resumed, noted, open_turns, rows

Talk: TypeAlias = tuple[tuple[str, str], ...]

PHONE, LETTERS = "phone", "letters"
"""A platform that recognises what it is sent again, and one that does not."""

TALKS: Final[dict[tuple[str, str], Talk]] = {
    (PHONE, "ada"): (("m1", "steps"), ("m2", "plain")),
    (PHONE, "cy"): (("m3", "long"),),
    (PHONE, "dan"): (("m4", "drains"),),
    (PHONE, "eve"): (("m5", "endless"), ("m6", "/stop")),
    (LETTERS, "fay"): (("m7", "says"),),
    (LETTERS, "guy"): (("m8", "late"),),
}
"""What people write, by platform and session: ids and texts, in order."""

ENDS: Final = {"m5": "stopped"}
"""What does not end in an answer."""

MORNING: Final = 3.0
"""Seconds until the stop."""

PATIENCE: Final = 300.0
"""Seconds of virtual time in which a gateway gets over whatever has passed."""

SETTINGS: Final = Settings(
    # Fewer slots than sessions: a settle hands its slot on.
    limits=Limits(turns=4),
    resume=ResumeRules(max_crashes=100),
    grace=4.0,
    budget=8.0,
)

Promised: TypeAlias = Callable[..., None]


def no_promise(what: str, *about: object) -> None:
    """Nobody writes down what was promised."""


def no_trouble(what: str) -> None:
    """Nobody minds."""


@attrs.define(eq=False)
class Day:
    """One process's share of the day. `promised` is called with whatever the gateway has said is on
    disk; `on_trouble` whenever it says that something could not be written or read."""

    world: World
    open_gateway: GatewayOpener
    promised: Promised = no_promise
    on_trouble: Callable[[str], None] = no_trouble
    patience: float = PATIENCE
    troubles: list[str] = attrs.field(factory=list[str])
    accepted: set[str] = attrs.field(init=False)
    _evening_comes: bool = False
    _attempts: dict[int, int] = attrs.field(factory=dict[int, int])
    _channels: dict[str, SurvivingChannel] = attrs.field(factory=dict[str, SurvivingChannel])

    def __attrs_post_init__(self) -> None:
        self.accepted = set(noted(self.world, "accepted"))

    # ----- the parts of the day

    async def pass_by(self) -> bool:
        """All of it. False: not everything came to its end, or there was no boot any more."""
        self._evening_comes = True
        if not await self._with_people(self._until_evening):
            return False
        self._evening_comes = False
        return await self.next_day()

    async def next_day(self) -> bool:
        """Boot, and see everything to its end."""
        return await self._with_people(self._to_the_end)

    async def last_day(self) -> bool:
        """The same, and then every message comes once more: each is recognised (promise 1)."""
        return await self._with_people(self._to_the_end_and_again)

    async def _with_people(
        self, part: Callable[[Gateway, trio.Nursery], Awaitable[bool]], tries: int = 3
    ) -> bool:
        """Boot, if need be several times, as a supervisor does; then a part of the day."""
        over = False
        async with trio.open_nursery() as people:
            for _ in range(tries):
                booted = False
                try:
                    async with self._boot() as gateway:
                        booted = True
                        over = await part(gateway, people)
                    break
                except StoreError as error:
                    if booted:
                        raise  # a gateway that runs goes on, whatever its disk does
                    self._hear_trouble(f"boot: {error}")
                    await trio.sleep(1)
            people.cancel_scope.cancel()
        return over

    async def _until_evening(self, gateway: Gateway, people: trio.Nursery) -> bool:
        for platform, session in TALKS:
            people.start_soon(self._write, gateway, platform, session, True)
        await trio.sleep(MORNING)
        return True

    async def _to_the_end(self, gateway: Gateway, people: trio.Nursery) -> bool:
        with trio.move_on_after(self.patience):
            async with trio.open_nursery() as writers:
                for platform, session in TALKS:
                    writers.start_soon(self._write, gateway, platform, session, False)
            await gateway.wait_idle()
            return True
        return False

    async def _to_the_end_and_again(self, gateway: Gateway, people: trio.Nursery) -> bool:
        over = await self._to_the_end(gateway, people)
        for (platform, session), talk in TALKS.items():
            for id, text in talk:
                receipt = await self._channels[platform].receive(session, id, text)
                assert receipt.status is ReceiptStatus.DUPLICATE, f"{id} was forgotten"
        await gateway.wait_idle()
        return over

    # ----- the gateway

    @asynccontextmanager
    async def _boot(self) -> AsyncGenerator[Gateway]:
        self.world.note(f"boot {json.dumps(open_turns(self.world))}")
        self._attempts.clear()
        self._channels = {
            PHONE: self.world.platform(PHONE, text_limit=40),
            LETTERS: self.world.platform(LETTERS, idempotent=False, text_limit=40),
        }
        channels = list(self._channels.values())
        async with self.open_gateway(
            self._agent, channels=channels, settings=SETTINGS, listen=self._hear
        ) as gateway:
            wal = self.world.store.with_name(self.world.store.name + "-wal")
            assert wal.exists(), "the store lives without its WAL"
            yield gateway

    def _hear(self, event: Event) -> None:
        assert not isinstance(event, GatewayFailed), event.traceback
        match event:
            case StoreTrouble() | SettleDelayed() | MarkingFailed():
                self._hear_trouble(f"{type(event).__name__}: {event.error}")
            case GatewayStarted():
                self.promised("epoch", event.epoch)
            case TurnBegun():
                self._attempts[event.turn] = event.attempt
                self.promised("begun", event.turn, event.attempt)
            case TurnsMarked():
                for turn, attempt in self._attempts.items():
                    self.promised("marked", turn, attempt)
            case TurnSettled():
                self._attempts.pop(event.turn, None)
                self.promised("settled", event.turn, str(event.state))
            case StepRemembered():
                self.promised("step", event.turn, event.name)
            case ReplyCommitted():
                self.promised("said", event.turn, event.key, event.text)
            case Delivered():
                self.promised("delivered", event.delivery.key)
            case _:
                pass

    def _hear_trouble(self, what: str) -> None:
        self.troubles.append(what)
        self.on_trouble(what)

    # ----- people

    async def _write(self, gateway: Gateway, platform: str, session: str, wait: bool) -> None:
        """Send what a session has to say, each message until it is accepted."""
        channel = self._channels[platform]
        for number, (id, text) in enumerate(TALKS[platform, session]):
            if id in self.accepted:
                continue
            if text == "late" and wait:
                await gateway.draining.wait_value(True)
            elif number:
                await trio.sleep(0.1)
            while id not in self.accepted:
                await self._send(channel, session, id, text)

    async def _send(self, channel: SurvivingChannel, session: str, id: str, text: str) -> None:
        message = channel.message(session, id, text)
        # A platform that is read from a place on: its place is kept with what was read.
        cursor = id if session == "ada" else None
        try:
            (receipt,) = await channel.receive_all(message, cursor=cursor)
        except StoreError as error:
            self._hear_trouble(f"accept: {error}")
        else:
            if receipt.accepted:
                self.world.note(f"accepted {id}")
                self.accepted.add(id)
                self.promised("accepted", channel.name, id)
                if cursor is not None:
                    self.promised("cursor", channel.name, cursor)
                return
        await trio.sleep(1)

    # ----- the agent

    async def _agent(self, turn: Turn) -> str:
        reason = str(turn.resumed.reason) if turn.resumed else "fresh"
        self.world.note(f"began {turn.id} {turn.attempt} {reason}")
        self.promised("begun", turn.id, turn.attempt)
        match turn.text:
            case "steps":
                return await self._steps(turn)
            case "says":
                await turn.say("Nearly there, and this takes more than one part.")
            case "long":
                await self._long(turn)
            case "drains" if self._evening_comes:
                await turn.draining.wait_value(True)
                await trio.sleep(1)
            case "endless":
                await trio.sleep_forever()
            case _:
                await _look_back(turn)
        return answer(turn.message.id)

    async def _steps(self, turn: Turn) -> str:
        id = turn.message.id

        async def look() -> str:
            await trio.sleep(0.01)
            return "seen"

        async def shoot() -> str:
            self.world.note(f"shot {id}")
            await trio.sleep(0.01)
            return "hit"

        assert await turn.step(look) == "seen"
        try:
            assert await turn.step(shoot, effect="unsafe") == "hit"
        except StepInDoubt:
            return f"in doubt: {id}"
        return answer(id)

    async def _long(self, turn: Turn) -> None:
        kept = f"kept {turn.id}"
        if kept in self.world.notes:
            assert turn.checkpointed == ["half"], "a checkpoint is lost"
        if turn.resumed is None:
            await turn.checkpoint(["half"])
            self.promised("checkpoint", turn.id)
            self.world.note(kept)
        if self._evening_comes:
            await trio.sleep_forever()


async def _look_back(turn: Turn) -> None:
    """Read the history; an agent that meets a failing disk there tries again."""
    while True:
        try:
            await turn.history()
            return
        except StoreError:
            await trio.sleep(0.5)


def answer(id: str) -> str:
    """What a message is answered with."""
    return f"re: {id}"


# ----- afterwards


def check_day(world: World, *, doubts: bool) -> None:
    """Everything that was sent has reached its end, once, in order; what resumed was exactly what
    was interrupted. `doubts`: an unsafe step may have been cut in the middle."""
    exactly_the_interrupted_resumed(world)
    check_invariants(world.store, settled=True)
    messages = dict(rows(world.store, "SELECT id, state FROM message"))
    wanted = {id: ENDS.get(id, "answered") for talk in TALKS.values() for id, _ in talk}
    assert messages == wanted, f"messages ended as {messages}"
    for (platform, session), talk in TALKS.items():
        _check_answers(world, platform, session, talk, doubts)
    for platform in (PHONE, LETTERS):
        _check_repeats(world, platform, forgetful=platform == LETTERS)
    shots = Counter(noted(world, "shot"))
    assert all(count == 1 for count in shots.values()), f"done twice: {shots}"


def _check_answers(world: World, platform: str, session: str, talk: Talk, doubts: bool) -> None:
    """People have had one answer to each message, in order (promises 2 and 7)."""
    texts = [text for text in world.shown(platform) if text.session == session]
    answered = [id for text in texts if text.final for id in text.in_reply_to]
    assert answered == [id for id, _ in talk if id not in ENDS], f"{session} was told {texts}"
    for id, kind in talk:
        said = [t.text for t in texts if t.in_reply_to == [id] and t.kind == "answer"]
        if kind in ("/stop", "endless"):
            continue
        allowed = (answer(id), f"in doubt: {id}") if doubts else (answer(id),)
        assert "".join(said) in allowed, f"{id} was answered {said}"


def _check_repeats(world: World, platform: str, *, forgetful: bool) -> None:
    """What came twice is the same text under the same key, and says that it repeats if its platform
    cannot know (promise 7)."""
    first: dict[str, str] = {}
    for text in world.arrived(platform):
        is_repeat = text.key in first
        assert first.setdefault(text.key, text.text) == text.text, f"{text.key} has changed"
        assert not is_repeat or text.repeat or not forgetful, f"{text.key} repeats, unsaid"
        assert forgetful or not text.repeat, f"{text.key} is said to repeat"
