"""One seed: several lives of one gateway on one store, and everything that can happen to them.

Time is virtual, tasks are scheduled by the seed, and so is what happens: people write, write again
and say /stop, some in the breath in which a turn ends; platforms are slow, busy, forgetful and
gone; disks are full and in doubt; somebody stops the gateway, twice, or leaves its block, or what
the agent owns falls over; and it dies, before or after any commit or at any step of any task. Some
lives are left alone after their trouble, and must get over it by themselves. The last one is calm:
everything must come to its end.

Dying is what it is outside: nothing of the process runs any more. A life has a thread of its own,
which is never run again once it has died, so that no `finally` of anybody's notices. Its successor
finds a copy of the files as they were at that instant. Whatever a life did to Python objects
outside of itself stays, as the world outside a process does.
"""

from __future__ import annotations

import queue
import random
import shutil
import threading
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, NoReturn

import apsw
import attrs
import trio
import trio.abc
from trio.testing import MockClock

from .. import (
    Busy,
    Delivery,
    Event,
    Gateway,
    Limits,
    Message,
    ResumeReason,
    ResumeRules,
    RetryLater,
    Settings,
    StoreError,
    Turn,
    Undeliverable,
    open_gateway,
)
from ._clock import VirtualClock
from ._invariants import violations
from ._memory import MemoryChannel
from ._model import Model
from ._schedule import schedule_by
from ._snapshot import Eye, Record

WatchedAgent = Callable[[Turn], Awaitable[str | None]]

ENDINGS: Final = {
    "stop": 3,
    "stop, then stop again": 2,
    "stop, now": 1,
    "come to rest": 2,
    "leave the block": 1,
    "cancel the block": 1,
    "fail in the block": 1,
    "lose what the agent owns": 1,
    "die at a commit": 6,
    "die at a step": 4,
    "die in the stop": 6,
    "die in the boot": 2,
}
"""How lives end, and how often."""

REAL_SECONDS: Final = 30.0
"""How long a life may take in real time before it counts as hung."""

VIRTUAL_SECONDS: Final = 1_000_000.0
"""How long the last life may take, on its clock, to bring everything to its end."""

CALM_LIVES: Final = 50
"""How many lives without trouble there may be until nothing is open any more."""

STORM: Final = 0.2
"""How often commits fail while the disk alone makes trouble."""

TRACE: Final = 80
"""How many of the last happenings a failure tells."""


class Left(BaseException):
    """The body of the gateway's block fails, or what the agent owns."""


@attrs.frozen(kw_only=True)
class Trouble:
    """How often things go wrong, as chances from 0 to 1.

    With `NO_TROUBLE`, disks, lines and platforms never fail, and nobody kills the process. It is
    stopped and started all the same, its block can fail, and a turn that does not end in a stop is
    left behind.
    """

    disk: float = 0.02
    """Of a commit to fail; and, if it has not, to stand and report an error all the same."""
    line: float = 0.1
    """Of a sending to fail, half of them after the text has arrived."""
    busy: float = 0.05
    """Of a platform to ask for patience."""
    blocked: float = 0.02
    """Of a reply to be undeliverable for good."""
    cut: float = 0.3
    """Of a connection to break, in each few seconds."""
    bad_input: float = 0.04
    """Of a message to be malformed."""
    deaths: bool = True
    """Whether lives may end in a death."""


NO_TROUBLE: Final = Trouble(disk=0, line=0, busy=0, blocked=0, cut=0, bad_input=0, deaths=False)


def always() -> bool:
    """Count from the beginning."""
    return True


def never() -> bool:
    """This life is to end in another way."""
    return False


@attrs.define(eq=False)
class Death:
    """Where this life ends, if it is to die: after so many commits or steps of tasks, counted from
    its beginning, from the request to stop, or while a turn runs that may be its killer."""

    what: str = ""
    left: int = 0
    moment: str = "after"
    counted: Callable[[], bool] = never

    def strikes(self, what: str, moment: str) -> bool:
        """Whether this is the instant."""
        if what != self.what or moment != self.moment or not self.counted():
            return False
        self.left -= 1
        return self.left == 0


class _Steps(trio.abc.Instrument):
    """Dies before a step of a task."""

    def __init__(self, lives: SeededLives) -> None:
        self._lives = lives

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._lives.may_die("step", "after")


@attrs.define(eq=False)
class SeededLives:
    """All lives of one seed. `run` tells what became of them."""

    seed: int
    agent: WatchedAgent
    folder: Path
    texts: Sequence[str]
    trouble: Trouble
    settings: Settings | None = None
    dice: random.Random = attrs.field(init=False)
    model: Model = attrs.field(init=False)
    clock: MockClock = attrs.field(init=False)
    wall: VirtualClock = attrs.field(init=False)
    trace: deque[str] = attrs.field(init=False)
    channels: list[MemoryChannel] = attrs.field(init=False)
    breath: trio.Event = attrs.field(init=False)
    """The next moment at which a call of the agent ends."""
    owned: trio.Nursery = attrs.field(init=False)
    """What the agent has opened beside itself."""
    store: Path = attrs.field(init=False)
    life: int = 0
    sent: int = 0
    cursor: int = 0
    unsure: list[Message] = attrs.field(factory=list[Message])
    death: Death = attrs.field(factory=Death)
    calm: bool = False
    storm: int = 0
    """How many commits may still fail although all else is calm."""
    is_quiet: bool = False
    outcome: queue.SimpleQueue[tuple[str, BaseException | None]] = attrs.field(
        factory=queue.SimpleQueue[tuple[str, BaseException | None]]
    )
    eye: Eye | None = None

    def __attrs_post_init__(self) -> None:
        self.dice = random.Random(self.seed)
        self.clock = MockClock(autojump_threshold=0)
        self.wall = VirtualClock()
        self.trace = deque(maxlen=TRACE)
        self.store = self.folder / "0" / "gateway.db"
        self.settings = self.settings or self._any_settings()
        idempotent = {"memory": self.dice.random() < 0.5, "other": self.dice.random() < 0.5}
        self.model = Model(self.settings, idempotent, self.settings.budget or 30.0)

    def _any_settings(self) -> Settings:
        dice = self.dice
        budget = dice.choice([1.0, 4.0, 8.0])
        return Settings(
            busy=dice.choice([Busy.QUEUE, Busy.QUEUE, *Busy]),
            grace=dice.choice([0.0, 0.3, 1.5]),
            budget=budget,
            limits=Limits(turns=dice.choice([1, 2, 3, 10])),
            resume=ResumeRules(
                concurrency=dice.choice([1, 2, 20]),
                max_crashes=dice.choice([3, 3, 100]),
                max_interruptions=dice.choice([2, 10]),
                within=dice.choice([None, timedelta(hours=1), timedelta(minutes=5)]),
            ),
            notices=dice.random() < 0.5,
        )

    # ----- the whole

    def run(self) -> None:
        """Live, until something is broken or the last life has ended. See `model`."""
        schedule_by(self.seed)
        loops = self.trouble.deaths and self.dice.random() < 0.1
        for _ in range(self.dice.randint(4, 6) if loops else self.dice.randint(1, 3)):
            self._one_life("die in a turn" if loops else self._any_ending())
            if self.model.broken:
                return
            self._between_lives()
        self.calm = True
        self._calm_lives()
        if not self.model.broken:
            self.model.broken += [f"the store: {what}" for what in self._violations()]
            self.model.all_has_ended(self.model.record)

    def _calm_lives(self) -> None:
        """Nothing goes wrong any more; but agents may still ask for restarts, and not end."""
        for _ in range(CALM_LIVES):
            self._one_life("the end")
            if self.is_quiet or self.model.broken:
                return
        self.model.broken.append(f"promise 1: not quiet after {CALM_LIVES} lives without trouble")

    def _any_ending(self) -> str:
        endings = {
            ending: weight for ending, weight in ENDINGS.items()
            if self.trouble.deaths or not ending.startswith("die")
        }  # fmt: skip
        return self.dice.choices(list(endings), list(endings.values()))[0]

    def _between_lives(self) -> None:
        """Time passes; somebody sets the wall clock; the machine is booted anew."""
        pause = self.dice.choice([0.0, 0.0, 1.0, 60.0, 600.0, 7200.0])
        self.clock.jump(pause)
        if self.dice.random() < 0.2:
            self.wall.jump(timedelta(seconds=self.dice.choice([-3600, 3600, -86_400, 86_400])))
        if self.dice.random() < 0.1:
            self.wall.machine += "'"

    def _one_life(self, ending: str) -> None:
        self.life += 1
        self.model.begin_life(self.clock.current_time(), self.wall.machine)
        self.death = self._death_of(ending)
        self.eye = None  # a dead one still looks at what the dead life left
        self.say(f"begins; it is to {ending}" if not self.calm else "begins, the last one")
        self.store.parent.mkdir(exist_ok=True)
        thread = threading.Thread(target=self._live, args=(ending,), daemon=True)
        thread.start()
        self._bury(*self._wait())

    def _wait(self) -> tuple[str, BaseException | None]:
        try:
            return self.outcome.get(timeout=REAL_SECONDS)
        except queue.Empty:
            return "hung", None

    def _bury(self, how: str, error: BaseException | None) -> None:
        """Look at what the life left, and give its files to the next one."""
        self.say(how)
        self.model.seen[f"life: {how}"] += 1
        if how == "hung":
            self.model.broken.append(f"promise 11: a life hangs: {self.life}")
            return
        if how == "failed":
            self.model.broken.append(f"promise 14: the gateway raised {error!r}")
            return
        self._leave_to_next()
        self.model.broken += [f"the store: {what}" for what in self._violations()]
        self.model.end_life(self._read(), self.clock.current_time(), died=how == "died")

    def _violations(self) -> tuple[str, ...]:
        return violations(self.store, settled=self.is_quiet) if self.store.exists() else ()

    def _read(self) -> Record:
        if not self.store.exists():
            return Record()
        eye = Eye(self.store)
        try:
            return eye.read()
        finally:
            eye.close()

    def _leave_to_next(self) -> None:
        """Copy the database and its WAL, as a dead process leaves them; SQLite makes its SHM."""
        old, self.store = self.store, self.folder / str(self.life) / "gateway.db"
        self.store.parent.mkdir()
        for suffix in ("", "-wal"):
            file = old.with_name(old.name + suffix)
            if file.exists():
                shutil.copyfile(file, self.store.with_name(self.store.name + suffix))

    # ----- one life, in a thread of its own

    def _live(self, ending: str) -> None:
        try:
            trio.run(self._main, ending, clock=self.clock, instruments=[_Steps(self)])
            self.outcome.put(("ended", None))
        except BaseException as error:  # noqa: ASYNC103 - told to whoever waits for this thread
            self.outcome.put(("failed", error))

    async def _main(self, ending: str) -> None:
        self.breath = trio.Event()
        self.channels = [self._channel("memory"), self._channel("other")]
        all_of_them = self.calm or ending == "come to rest" or self.dice.random() < 0.8
        served = self.channels if all_of_them else self.channels[:1]
        async with trio.open_nursery() as outside:
            try:
                with trio.CancelScope() as scope:
                    await self._in_gateway(ending, served, outside, scope)
            except Left:
                self.say("its body has failed, or the agent's")
            self.model.has_stopped(trio.current_time())
            outside.cancel_scope.cancel()
        if self.eye is not None:
            self.eye.close()
            self.eye = None

    async def _in_gateway(
        self,
        ending: str,
        served: list[MemoryChannel],
        outside: trio.Nursery,
        scope: trio.CancelScope,
    ) -> None:
        try:
            async with self._open(served) as gateway:
                gateway.on_unresponsive = self._leave_turns_behind
                self.model.grace = gateway.plan.grace
                self.model.budget = gateway.plan.budget
                for channel in served:
                    outside.start_soon(self._cut, channel)
                if self.calm:
                    for channel in served:
                        await self._people(channel)
                    await self._calm_end(gateway)
                else:
                    for channel in served:
                        outside.start_soon(self._people, channel)
                        outside.start_soon(self._crowd, channel)
                    await self._end(ending, gateway, outside, scope)
        except StoreError as error:
            # A disk that failed at boot. The next life tries again.
            self.say(f"its store cannot be opened: {error}")

    def _open(self, served: Sequence[MemoryChannel]) -> Any:
        return open_gateway(
            self._owning,
            store=self.store,
            channels=served,
            settings=self.settings,
            listen=self._hear,
            clock=self.wall,
            inline_store=True,
            tap=self._tap,
        )

    async def _calm_end(self, gateway: Gateway) -> None:
        if not await self._comes_to_rest(gateway) or self.model.stop_at is not None:
            return  # or else an agent has asked for a restart
        self.is_quiet = True
        left = {name: n for name, n in gateway.statistics().items() if n and name != "slots_free"}
        self.model.hold(6, not left, f"idle, and still has {left}")

    @asynccontextmanager
    async def _owning(self) -> AsyncGenerator[WatchedAgent, None]:
        """The agent, and what it owns, which can fall over."""
        async with trio.open_nursery() as self.owned:
            yield self._watched

    async def _fall_over(self) -> NoReturn:
        raise Left

    async def _rest(self, gateway: Gateway) -> None:
        """Nobody writes any more, and soon nothing goes wrong: the same life gets over it by
        itself."""
        self.calm = True
        self.storm = self.dice.randint(0, 20) if self.trouble.disk else 0
        if await self._comes_to_rest(gateway):
            self.model.seen["a life came to rest after trouble"] += self.model.disk_failed
        self.calm, self.storm = False, 0

    async def _comes_to_rest(self, gateway: Gateway) -> bool:
        """Wait until everything has come to its end, or the gateway is to stop."""
        with trio.move_on_after(VIRTUAL_SECONDS) as patience:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._until_stop, gateway, nursery.cancel_scope)
                await gateway.wait_idle()
                nursery.cancel_scope.cancel()
        if patience.cancelled_caught:
            self.model.broken.append(
                f"promise 1: not idle after {VIRTUAL_SECONDS:g} s: {gateway.statistics()}"
            )
        return not patience.cancelled_caught

    async def _until_stop(self, gateway: Gateway, scope: trio.CancelScope) -> None:
        await gateway.wait_stop_requested()
        scope.cancel()

    async def _end(
        self, ending: str, gateway: Gateway, outside: trio.Nursery, scope: trio.CancelScope
    ) -> None:
        with trio.move_on_after(self.dice.random() * 4):
            await gateway.wait_stop_requested()
        reason = self.dice.choice([ResumeReason.RESTART, ResumeReason.SHUTDOWN])
        if ending == "come to rest":
            await self._rest(gateway)
        if ending == "cancel the block":
            scope.cancel()
            await trio.sleep_forever()
        elif ending == "fail in the block":
            raise Left
        elif ending == "lose what the agent owns":
            self.owned.start_soon(self._fall_over)
            await trio.sleep_forever()
        elif ending != "leave the block":
            gateway.request_stop(reason)
            if "," in ending:
                outside.start_soon(self._stop_again, gateway, ending)
            await trio.lowlevel.checkpoint()

    async def _stop_again(self, gateway: Gateway, ending: str) -> None:
        await trio.sleep(self.dice.random() * 2)
        gateway.request_stop(ResumeReason.RESTART, now=ending == "stop, now")

    # ----- dying

    def _death_of(self, ending: str) -> Death:
        dice = self.dice
        moment = dice.choice(["before", "after"])
        if ending == "die at a commit":
            return Death("commit", dice.randint(2, 25), moment, always)
        if ending == "die at a step":
            return Death("step", dice.randint(50, 400), "after", always)
        if ending == "die in a turn":
            return Death("step", dice.randint(1, 40), "after", self._has_a_killer)
        if ending == "die in the boot":
            return Death("commit", dice.randint(1, 3), moment, always)
        if ending == "die in the stop":
            if dice.random() < 0.5:
                return Death("commit", dice.randint(1, 12), moment, self._stops)
            return Death("step", dice.randint(1, 150), "after", self._stops)
        return Death()

    def _stops(self) -> bool:
        return self.model.stop_at is not None

    def _has_a_killer(self) -> bool:
        """A turn runs that was open when the life before ended; or any, if there was none."""
        running = {turn.id for turn in self.model.active.values()}
        open_before = self.model.open_before
        return bool(running.intersection(open_before) if open_before else running)

    def may_die(self, what: str, moment: str) -> None:
        """Here the process can die."""
        if self.death.strikes(what, moment):
            self._die(f"dies: {moment} a {what}")

    def _die(self, how: str) -> NoReturn:
        self.say(how)
        self.outcome.put(("died", None))
        while True:  # nothing of this life runs any more
            threading.Event().wait()

    def _leave_turns_behind(self, report: object) -> None:
        """As a host does that can leave: the process is gone, with true markers."""
        self.model.left = True
        self.model.has_stopped(trio.current_time())
        self.model.seen["left turns behind that did not end"] += 1
        self._die("leaves turns behind")

    # ----- what is watched

    def say(self, what: str) -> None:
        """For whoever has to find out what happened."""
        now = self.clock.current_time()
        self.trace.append(f"{now:10.3f}  life {self.life}  {what}")

    def _tap(self, moment: str) -> None:
        if moment == "after":
            if self.eye is None:
                self.eye = Eye(self.store)
            self.model.commit(self.eye.glance(), trio.current_time())
            self.say(f"commit {self.model.figures['commits']}")
        self.may_die("commit", moment)
        if self.dice.random() < self._chance_of_a_fault():
            self.storm = max(self.storm - 1, 0)
            self.model.figures["disk_faults"] += 1
            self.model.disk_fails()
            self.say(f"the disk fails {moment} a commit")
            raise self.dice.choice([apsw.FullError("full (a test)"), apsw.IOError("EIO (a test)")])

    def _chance_of_a_fault(self) -> float:
        if self.calm:
            return STORM if self.storm else 0.0
        return self.trouble.disk

    def _hear(self, event: Event) -> None:
        self.say(f"{type(event).__name__} {_short(event)}")
        self.model.hears(event, trio.current_time())

    async def _watched(self, turn: Turn) -> str | None:
        self.say(f"{turn!r} begins")
        self.model.begins(turn)
        try:
            text = await self.agent(turn)
            self.model.returns(turn, text)
            return text
        except BaseException as error:  # noqa: ASYNC103 - re-raised, whatever it is
            if not isinstance(error, trio.Cancelled):
                self.model.falls_over(turn)
            raise
        finally:
            self.breath.set()
            self.breath = trio.Event()
            for _ in range(self.dice.randint(0, 4)):  # whoever waited for it comes before its end
                await trio.lowlevel.cancel_shielded_checkpoint()
            self.model.ends(turn, trio.current_time())
            self.say(f"{turn!r} ends")

    # ----- what happens

    def _channel(self, name: str) -> MemoryChannel:
        late = not self.calm and self.dice.random() < 0.3
        channel = MemoryChannel(
            name,
            idempotent=self.model.idempotent[name],
            text_limit=40 if self.seed % 3 == 0 else None,
            notices=True,
            connected=not late,
        )
        channel.before_send = self._sending
        return channel

    async def _people(self, channel: MemoryChannel) -> None:
        """Send what nobody acknowledged, then go on writing."""
        for message in [m for m in self.unsure if m.channel == channel.name]:
            await self._hand_in(channel, message)
        while not self.calm:
            await trio.sleep(self.dice.random() * 0.8)
            if self.dice.random() < self.trouble.bad_input:
                await self._hand_in_badly(channel)
            elif self.dice.random() < 0.08:
                await self._hand_in_batch(channel)
            elif self.dice.random() < 0.1 and self.model.accepted:
                told = self.dice.choice(list(self.model.accepted.values()))
                if told.message.channel == channel.name:
                    await self._hand_in(channel, told.message)
            else:
                await self._hand_in(channel, self._any_message(channel))

    async def _crowd(self, channel: MemoryChannel) -> None:
        """Now and then, several write to one session in the breath in which a turn ends."""
        while not self.calm:
            await self.breath.wait()
            if self.dice.random() < 0.1:
                first = self._any_message(channel)
                async with trio.open_nursery() as nursery:
                    for message in first, *(self._any_message(channel) for _ in range(2)):
                        one = attrs.evolve(message, session=first.session)
                        nursery.start_soon(self._hand_in, channel, one)
                        await trio.lowlevel.checkpoint()

    def _any_message(self, channel: MemoryChannel) -> Message:
        self.sent += 1
        text = self.dice.choice(self.texts)
        if self.dice.random() < 0.12:
            text = self.dice.choice(["/stop", "/stop", "/status", "/new", "/retry"])
        return channel.message(f"s{self.dice.randrange(3)}", f"m{self.sent}", text)

    async def _hand_in(self, channel: MemoryChannel, *messages: Message, cursor: int = 0) -> None:
        """Until it is acknowledged: nobody knows whether it was taken, if nobody has said so."""
        for message in messages:
            self.model.hands_in(message)
            if message not in self.unsure:
                self.unsure.append(message)
        value = str(cursor) if cursor else None
        while True:
            try:
                receipts = await channel.receive_all(*messages, cursor=value)
                break
            except (StoreError, RuntimeError):
                await trio.sleep(self.dice.random())
        for message, receipt in zip(messages, receipts, strict=True):
            self.say(f"{message.id} {message.text!r} of {message.session}: {receipt.status}")
            self.model.receipt(message, receipt)
            if message in self.unsure:
                self.unsure.remove(message)
        if not all(receipt.accepted for receipt in receipts):
            self._forget_batches(channel.name, {message.id for message in messages})

    def _forget_batches(self, channel: str, refused: set[str]) -> None:
        """A platform would send them again, and its cursor would not move. This one forgets them,
        also where they were refused one by one, in a later life than their batch."""
        batches = self.model.batches.get(channel, {})
        for number, ids in list(batches.items()):
            if refused.intersection(ids):
                del batches[number]

    async def _hand_in_batch(self, channel: MemoryChannel) -> None:
        self.cursor += 1
        messages = [self._any_message(channel) for _ in range(self.dice.randint(1, 3))]
        if self.model.settings.busy is Busy.REJECT:
            return  # what was refused is covered all the same, and that is as it should be
        batches = self.model.batches.setdefault(channel.name, {})
        batches[self.cursor] = tuple(message.id for message in messages)
        await self._hand_in(channel, *messages, cursor=self.cursor)

    async def _hand_in_badly(self, channel: MemoryChannel) -> None:
        self.sent += 1
        message = channel.message("s0", f"m{self.sent}", "hello")
        bad: Any = self.dice.choice(
            [
                attrs.evolve(message, session=""),
                attrs.evolve(message, id="x" * 2000),
                attrs.evolve(message, text="\ud800"),
                attrs.evolve(message, text="x" * (1 << 20) + "x"),
            ]
        )
        try:
            (receipt,) = await channel.receive_all(bad)
        except (StoreError, RuntimeError):
            return
        self.model.receipt(bad, receipt, well_formed=False)

    async def _cut(self, channel: MemoryChannel) -> None:
        """The line breaks now and then; who is late connects."""
        await trio.sleep(self.dice.random() * 4)
        channel.connect()
        while not self.calm:
            await trio.sleep(self.dice.random() * 6)
            if self.dice.random() < self.trouble.cut:
                channel.break_down(OSError("the line (a test)"))

    async def _sending(self, delivery: Delivery) -> None:
        try:
            await self._send(delivery)
        finally:
            self.model.sending_ended(trio.current_time())

    async def _send(self, delivery: Delivery) -> None:
        """The platform: slow, busy, forgetful."""
        dice, trouble = self.dice, NO_TROUBLE if self.calm else self.trouble
        await trio.sleep(dice.random() * 0.3)
        if dice.random() < trouble.busy:
            raise RetryLater(dice.random() * 5)
        if dice.random() < trouble.blocked:
            raise Undeliverable("blocked (a test)")
        fails = dice.random() < trouble.line
        if fails and dice.random() < 0.5:
            raise OSError("the line (a test)")
        self.say(f"arrived: {delivery.key} {delivery.text!r}")
        self.model.arrives(delivery)
        if fails:
            raise OSError("the line, after it arrived (a test)")


def _short(event: Event) -> str:
    """The fields of an event, but for tracebacks and what a delivery carries."""
    shown = {
        field.name: getattr(event, field.name)
        for field in attrs.fields(type(event))
        if field.name != "traceback"
    }
    if "delivery" in shown:
        shown["delivery"] = shown["delivery"].key
    return ", ".join(f"{name}={value!s}" for name, value in shown.items())
