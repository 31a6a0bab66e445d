"""Lives of a gateway that is played from outside, and the world that outlives them.

Each life is one pumped Trio run (see `_guest`) around a real gateway: its store on a disk that
fails when told, platforms in memory with moods, agents on strings, people who write. The world
keeps the model of the promises, what the platforms got, and the files.

Dying is what it is outside: the database and its WAL are copied at that very instant, in the middle
of a commit or of a step, and the next life finds the copy. One thread can have one Trio run at a
time, so what is left of the dead one is not frozen but let go: it unwinds over files that nobody
reads any more, and everything that it could do to the world is cut off. `Life.alive` is that cut:
each thread to the world asks it first.
"""

from __future__ import annotations

import shutil
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import apsw
import attrs
import trio
import trio.abc

from trio_gateway import (
    ChannelEnded,
    Delivery,
    Event,
    Gateway,
    GatewayState,
    GatewayStopping,
    Message,
    Receipt,
    ReceiptStatus,
    Refused,
    Reply,
    ResumeReason,
    RetryLater,
    SessionKey,
    Settings,
    StoreError,
    Turn,
    Undeliverable,
    open_gateway,
)
from trio_gateway._errors import unwrap
from trio_gateway._events import (
    ChannelConnected,
    ChannelFailed,
    MessageAccepted,
    SettleDelayed,
    StopRequested,
    StoreTrouble,
)
from trio_gateway._messages import LOCAL
from trio_gateway.testing import MemoryChannel, VirtualClock, violations
from trio_gateway.testing._model import SUSPECT, Model
from trio_gateway.testing._schedule import schedule_by
from trio_gateway.testing._seeded import Death, Left
from trio_gateway.testing._snapshot import Eye, Record

from ._guest import Guest, Stuck
from ._puppets import Memory, Puppet

PLATFORMS: Final = ("memory", "other")

CALM_SECONDS: Final = 100_000.0
"""Virtual seconds in which a calm life brings everything to its end."""

CALM_LIVES: Final = 10
"""How many lives without trouble there may be until nothing is open any more."""

TROUBLE_LASTS: Final = 31.0
"""Virtual seconds after which whatever the disk refused was tried again."""

ERRORS: Final[dict[str, type[apsw.Error]]] = {"full": apsw.FullError, "EIO": apsw.IOError}


class _Steps(trio.abc.Instrument):
    """Dies before a step of a task."""

    def __init__(self, life: Life) -> None:
        self._life = life

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._life.may_die("step", "after")


# ----- the world


@attrs.define(eq=False)
class World:
    """What outlives every process: files, platforms, people, and what all of them remember."""

    folder: Path
    settings: Settings
    idempotent: dict[str, bool]
    text_limit: int | None = None
    model: Model = attrs.field(init=False)
    store: Path = attrs.field(init=False)
    wall: VirtualClock = attrs.field(factory=VirtualClock)
    memory: Memory = attrs.field(factory=Memory)
    trace: deque[str] = attrs.field(factory=lambda: deque[str](maxlen=60))
    figures: Counter[str] = attrs.field(factory=Counter[str])
    now: float = 0.0
    lives: int = 0
    life: Life | None = None
    calm: bool = False
    quiet: bool = False
    pulse: int = 0
    """Moves whenever something happens: a move that leaves it alone did nothing."""

    # ----- what is going to happen
    hold: int = 0
    """So many moves more are held, to be made in one breath..."""
    apart: int = 0
    """...so many turns of Trio's loop apart."""
    held: list[Callable[[Life], object]] = attrs.field(factory=list["Callable[[Life], object]"])
    death: Death = attrs.field(factory=Death)
    faults: deque[tuple[str, str]] = attrs.field(factory=deque[tuple[str, str]])
    moods: dict[str, deque[str]] = attrs.field(
        factory=lambda: {name: deque[str]() for name in PLATFORMS}
    )

    # ----- what people have sent
    sent: int = 0
    cursor: int = 0
    known: list[Message] = attrs.field(factory=list[Message])
    unsure: list[Message] = attrs.field(factory=list[Message])
    """Sent, and neither acknowledged nor refused."""
    unsure_batches: set[tuple[str, int]] = attrs.field(factory=set[tuple[str, int]])

    def __attrs_post_init__(self) -> None:
        self.model = Model(self.settings, self.idempotent, self.settings.budget or 30.0)
        self.store = self.folder / "0" / "gateway.db"
        self.store.parent.mkdir(parents=True)

    def say(self, what: str) -> None:
        """For whoever has to find out what happened."""
        now = self.now if self.life is None else self.life.now
        self.trace.append(f"{now:10.3f}  life {self.lives}  {what}")

    # ----- lives

    def boot(self, served: Sequence[str], late: Sequence[str], schedule: int) -> None:
        """A process is started on what stands on disk."""
        self.lives += 1
        schedule_by(schedule)
        self.model.begin_life(self.now, self.wall.machine)
        self.death = Death()
        self.faults.clear()
        self.say("boots")
        self.life = Life(self, served, late)
        self.life.guest.rest()
        self._look_after()

    def move(self, call: Callable[[Life], object]) -> None:
        """Do something to the living gateway, and wait until everybody is blocked. While moves are
        held, only note it."""
        self.held.append(call)
        if not self.hold:
            self.go()

    def go(self) -> None:
        """Do all that is held, in one breath."""
        calls, self.held, self.hold = self.held, [], 0
        life = self.life
        if life is not None and calls:
            life.guest.order(*[partial(call, life) for call in calls], apart=self.apart)
            self._look_after()

    def start(self, call: Callable[[Life], Awaitable[None]]) -> None:
        """Begin something beside the living gateway, and wait until everybody is blocked."""
        self.move(lambda life: life.around.start_soon(call, life))

    def pass_time(self, seconds: float, until: trio.Event | None = None) -> None:
        """Virtual time goes by."""
        self.go()
        if self.life is not None:
            self.pulse += 1
            self.life.guest.pass_time(seconds, until)
            self._look_after()

    def stops(self) -> bool:
        """Whether the process has been asked to stop."""
        return self.model.stop_at is not None

    def kill(self) -> None:
        """The process dies while everybody in it is blocked."""
        self.go()
        if self.life is not None:
            self.life.die("dies at rest")
            self._look_after()

    def _look_after(self) -> None:
        """Whether it still lives; else bury it."""
        life = self.life
        if life is None:
            return
        self.now = life.now
        if not life.alive:
            self.life = None
            life.vanish()
            self._bury(died=True)
        elif (outcome := life.guest.outcome) is not None:
            self.life = None
            life.close()
            self.say("ended")
            try:
                outcome.unwrap()
            except BaseException as error:  # noqa: ASYNC103 - noted, and nobody waits for it
                self.model.broken.append(f"promise 14: the gateway raised {unwrap(error)!r}")
            self._bury(died=False)

    def _bury(self, *, died: bool) -> None:
        """Look at what it left on disk."""
        self.pulse += 1
        self.model.broken += [f"the store: {what}" for what in violations(self.store)]
        eye = Eye(self.store)
        try:
            self.model.end_life(eye.read(), self.now, died=died)
        finally:
            eye.close()

    def bequeath(self) -> Path:
        """Copy database and WAL as they are at this instant, for the next life; SQLite makes its
        SHM. Returns the folder that only the dead one uses from now on."""
        old, self.store = self.store, self.folder / str(self.lives) / "gateway.db"
        self.store.parent.mkdir()
        for suffix in ("", "-wal"):
            file = old.with_name(old.name + suffix)
            if file.exists():
                shutil.copyfile(file, self.store.with_name(self.store.name + suffix))
        return old.parent

    # ----- what people send

    def message(self, channel: str, session: str, text: str) -> Message:
        """A message that nobody has sent before."""
        self.sent += 1
        message = Message(session=session, id=f"m{self.sent}", text=text, channel=channel)
        self.known.append(message)
        self.unsure.append(message)
        self.model.hands_in(message)
        return message

    def acknowledged(self, message: Message) -> None:
        """Whoever sent it knows what became of it."""
        if message in self.unsure:
            self.unsure.remove(message)

    def next_cursor(self, channel: str, messages: Sequence[Message]) -> int:
        """The cursor of a channel that covers these. A platform goes on from the one that stands
        on disk: what it covered with a later one, and was not acknowledged, it covers anew."""
        on_disk = int(self.model.disk.cursors.get(channel, "0"))
        batches = self.model.batches.setdefault(channel, {})
        for name in [name for name in self.unsure_batches if name[0] == channel]:
            self.unsure_batches.discard(name)
            if name[1] > on_disk:
                batches.pop(name[1], None)
        self.cursor += 1
        batches[self.cursor] = tuple(message.id for message in messages)
        self.unsure_batches.add((channel, self.cursor))
        return self.cursor

    # ----- the end of all

    def come_to_the_end(self) -> None:
        """Nothing goes wrong any more; everything has to come to its end."""
        self.go()
        self.calm = True
        self.death, self.moods = Death(), {name: deque() for name in PLATFORMS}
        self.faults.clear()
        for _ in range(CALM_LIVES):
            if self.life is None:
                self.boot(PLATFORMS, (), self.lives)
            if self.life is not None:
                self._come_to_rest(self.life)
            if self.quiet or self.model.broken:
                break
        if not self.model.broken:
            self.model.hold(1, self.quiet, f"not quiet after {CALM_LIVES} lives without trouble")
            found = violations(self.store, settled=self.quiet)
            self.model.broken += [f"the store: {what}" for what in found]
            self.model.all_has_ended(self.model.record)

    def _come_to_rest(self, life: Life) -> None:
        rested = trio.Event()
        self.say("is calm now")
        self.move(Life.calm_down)
        if self.life is life and life.gateway is None:
            self.pass_time(TROUBLE_LASTS)  # the boot waits for the disk
        if self.life is life:
            self.start(partial(Life.wait_quiet, rested=rested))
            self.pass_time(CALM_SECONDS, rested)
        if self.life is not life:
            return  # it was stopping already
        if not rested.is_set() or life.gateway is None:
            stats = None if life.gateway is None else life.gateway.statistics()
            self.model.hold(1, False, f"not at rest after {CALM_SECONDS:g} s: {stats}")
            return
        stopping = life.gateway.stop_reason is not None
        if not stopping:
            left = {k: n for k, n in life.gateway.statistics().items() if n and k != "slots_free"}
            self.model.hold(6, not left, f"at rest, and still has {left}")
        self.move(lambda life: life.leaving.set())
        self.pass_time(self.model.budget + 1)
        self.model.hold(11, self.life is None, "a calm stop does not end")
        self.quiet = not stopping and len(life.channels) == len(PLATFORMS)

    def close(self) -> None:
        """Whatever still lives is over. If that does not let go, its thread is lost: it can have no
        other run."""
        if self.life is not None:
            self.life.die("the story is over")
            life, self.life = self.life, None
            with suppress(Stuck):
                life.vanish()


# ----- one life


@attrs.define(eq=False, init=False)
class Life:
    """One process."""

    world: World
    alive: bool
    gateway: Gateway | None
    channels: dict[str, MemoryChannel]
    connected: set[str]
    cut_at: dict[str, float]
    late: set[str]
    """Channels that will not connect by themselves."""
    hanging: int
    """Texts that a platform has taken, and keeps."""
    puppets: dict[int, Puppet]
    askers: list[trio.CancelScope]
    asked: dict[str, Message]
    handing: Counter[str]
    """Messages on their way into the inbox, but for what `ask` hands in."""
    guest: Guest
    leaving: trio.Event
    scope: trio.CancelScope
    around: trio.Nursery
    body_fails: bool
    trouble_until: float
    _eye: Eye | None
    _old: Path | None
    _released: trio.Event

    def __init__(self, world: World, served: Sequence[str], late: Sequence[str]) -> None:
        self.world = world
        self.alive = True
        self.gateway = None
        self.connected, self.late = set(), set(late) & set(served)
        self.cut_at, self.hanging = {}, 0
        self.puppets, self.askers, self.asked = {}, [], {}
        self.handing = Counter()
        self.leaving, self.scope = trio.Event(), trio.CancelScope()
        self.body_fails = False
        self.trouble_until = 0.0
        self._eye = self._old = None
        self._released = trio.Event()
        self.channels = {name: self._channel(name, name not in late) for name in served}
        self.guest = Guest(self._main, world.now, [_Steps(self)])

    @property
    def now(self) -> float:
        """Virtual seconds."""
        return self.guest.clock.current_time()

    @property
    def calm(self) -> bool:
        """See `Stage.calm`."""
        return self.world.calm

    @property
    def model(self) -> Model:
        """See `Stage.model`."""
        return self.world.model

    @property
    def memory(self) -> Memory:
        """See `Stage.memory`."""
        return self.world.memory

    @property
    def faults(self) -> int:
        """See `Stage.faults`."""
        return self.world.figures["disk_faults"]

    def say(self, what: str) -> None:
        """See `Stage.say`."""
        if self.alive:
            self.world.say(what)

    def look(self) -> Record:
        """See `Stage.look`."""
        return self._eyes().read()

    def _eyes(self) -> Eye:
        if self._eye is None:
            self._eye = Eye(self.world.store)
        return self._eye

    def close(self) -> None:
        """Look no more."""
        if self._eye is not None:
            self._eye.close()
            self._eye = None

    # ----- what it consists of

    async def _main(self) -> None:
        async with trio.open_nursery() as self.around:
            try:
                with self.scope:
                    await self._in_gateway()
            except Left:
                self.say("its body has failed")
            except StoreError as error:
                self.say(f"its store cannot be opened: {error}")
            if self.alive:
                self.model.has_stopped(trio.current_time())
            self.around.cancel_scope.cancel()

    async def _in_gateway(self) -> None:
        async with open_gateway(
            self._agent,
            store=self.world.store,
            channels=list(self.channels.values()),
            settings=self.world.settings,
            listen=self._hear,
            clock=self.world.wall,
            inline_store=True,
            tap=self._tap,
        ) as gateway:
            gateway.on_unresponsive = self._leave_turns_behind
            self.gateway = gateway
            self.model.grace = gateway.plan.grace
            await self.leaving.wait()
            if self.body_fails:
                raise Left

    async def _agent(self, turn: Turn) -> Any:
        puppet = Puppet(self, turn)
        if self.alive:
            self.world.pulse += 1
            self.say(f"{turn!r} begins")
            self.model.begins(turn)
            channel = turn.session.channel
            cut_now = self.cut_at.get(channel) == self.now
            self.model.hold(5, self._reaches(channel) or cut_now, f"{turn!r} begins for nobody")
            self.puppets[turn.id] = puppet
        try:
            answer = await puppet.play()
            if self.alive:
                self.model.returns(turn, answer)
            return answer
        except BaseException as error:  # noqa: ASYNC103 - re-raised, whatever it is
            if self.alive and not isinstance(error, trio.Cancelled):
                self.model.falls_over(turn)
            raise
        finally:
            self.puppets.pop(turn.id, None)
            if self.alive:
                self.model.ends(turn, trio.current_time())
                self.say(f"{turn!r} ends")

    # ----- dying

    def may_die(self, what: str, moment: str) -> None:
        """Here the process can die."""
        if self.alive and self.world.death.strikes(what, moment):
            self.die(f"dies: {moment} a {what}")

    def die(self, how: str) -> None:
        """Nothing that happens here from now on happens."""
        self.say(how)
        self.alive = False
        self.close()
        self._old = self.world.bequeath()
        self.guest.halt()

    def _leave_turns_behind(self, report: object) -> None:
        """As a host does that can leave: the process is gone, with true markers."""
        if self.alive:
            self.model.left = True
            self.model.has_stopped(trio.current_time())
            self.model.seen["left turns behind that did not end"] += 1
            self.die("leaves turns behind")

    def vanish(self) -> None:
        """Let what is left of a dead process unwind."""
        for puppet in list(self.puppets.values()):
            puppet.hurry()
        self._released.set()
        self.leaving.set()
        self.scope.cancel()
        self.guest.let_go()
        if self._old is not None:
            shutil.rmtree(self._old)

    # ----- what is watched

    def _tap(self, moment: str) -> None:
        if not self.alive:
            return
        world = self.world
        if moment == "after":
            world.pulse += 1
            self.model.commit(self._eyes().glance(), trio.current_time())
            self.say(f"commit {self.model.figures['commits']}")
        self.may_die("commit", moment)
        if self.alive and world.faults and world.faults[0][0] == moment:
            _, kind = world.faults.popleft()
            world.figures["disk_faults"] += 1
            self.model.disk_fails()
            self.say(f"the disk fails {moment} a commit: {kind}")
            raise ERRORS[kind](f"{kind} (a test)")

    def _hear(self, event: Event) -> None:
        if not self.alive:
            return
        self.world.pulse += 1
        self.say(f"{type(event).__name__} {_short(event)}")
        self.model.hears(event, trio.current_time())
        match event:
            case ChannelConnected():
                self.connected.add(event.channel)
            case ChannelFailed():
                self.connected.discard(event.channel)
                self.cut_at[event.channel] = trio.current_time()
            case StopRequested():
                self.leaving.set()
            case StoreTrouble() | SettleDelayed():
                self.trouble_until = trio.current_time() + TROUBLE_LASTS
            case MessageAccepted():
                self._ask_accepted(event)
            case _:
                pass

    # ----- people and the host

    async def hand_in(self, *messages: Message, cursor: int = 0, bad: bool = False) -> None:
        """Messages of one channel, and the cursor that covers them."""
        world, channel = self.world, messages[0].channel
        self.handing.update(message.id for message in messages)
        try:
            receipts = await self._accept(messages, str(cursor) if cursor else None)
        except StoreError as error:
            if self.alive:
                self.say(f"not accepted: {error}")
                self._forget_batch(channel, cursor)
            return
        finally:
            self.handing.subtract(message.id for message in messages)
        if not self.alive:
            return
        for message, receipt in zip(messages, receipts, strict=True):
            world.pulse += 1
            self.say(f"{message.id!r:.9} {message.text!r:.20}: {receipt.status}")
            self.model.receipt(message, receipt, well_formed=not bad)
            world.acknowledged(message)
        world.unsure_batches.discard((channel, cursor))
        if not all(receipt.accepted for receipt in receipts):
            # The platform sends them again, and its cursor does not move. This one forgets them.
            self._forget_batch(channel, cursor)

    def _forget_batch(self, channel: str, cursor: int) -> None:
        self.model.batches.get(channel, {}).pop(cursor, None)
        self.world.unsure_batches.discard((channel, cursor))

    async def _accept(self, messages: Sequence[Message], cursor: str | None) -> tuple[Receipt, ...]:
        channel = self.channels.get(messages[0].channel)
        if channel is not None:
            return await channel.receive_all(*messages, cursor=cursor)
        assert self.gateway is not None
        return await self.gateway.accept(messages)

    async def ask(self, message: Message) -> None:
        """The host hands in a message, and waits for what is said to it."""
        assert self.gateway is not None
        with trio.CancelScope() as scope:
            self.askers.append(scope)
            self.asked[message.id] = message
            try:
                replies = await self.gateway.ask(message)
            except Refused as error:
                refused = Receipt(
                    status=ReceiptStatus.REFUSED,
                    session=message.key,
                    id=message.id,
                    reason=str(error),
                )
                if self.alive:
                    self.model.receipt(message, refused)
                    self.world.acknowledged(message)
            except GatewayStopping:
                stops = self.model.stop_at is not None
                self.model.hold(1, not self.alive or stops, "ask says that the gateway stops")
            except StoreError as error:
                self.say(f"asked in vain: {error}")
            else:
                self._answered(message, replies)
            finally:
                self.asked.pop(message.id, None)
                self.askers.remove(scope)

    def _ask_accepted(self, event: MessageAccepted) -> None:
        """What `ask` was told by the inbox; if nobody hands the same in at the same time."""
        if event.session.channel != LOCAL or self.handing[event.message_id] > 0:
            return
        message = self.asked.pop(event.message_id, None)
        if message is None:
            return
        status = ReceiptStatus.DUPLICATE if event.duplicate else ReceiptStatus.ACCEPTED
        self.model.receipt(message, Receipt(status=status, session=message.key, id=message.id))
        self.world.acknowledged(message)

    def _answered(self, message: Message, replies: Sequence[Reply]) -> None:
        if not self.alive:
            return
        self.world.pulse += 1
        record, hold = self.look(), self.model.hold
        row = record.messages.get((LOCAL, message.id))
        if row is None or not row.ended:
            hold(1, False, f"message {message.id} is called ended, and is {row}")
            return
        self.model.seen["asked and answered"] += 1
        answer = self.model.returned.get(row.turn or 0)
        if row.state == "answered" and row.turn is not None and answer:
            last = replies[-1] if replies else None
            said = last is not None and last.final and last.text == answer
            hold(6, said, f"message {message.id} was answered {answer!r}, its asker got {last}")

    async def stop_turn(self, key: SessionKey) -> None:
        """The host ends the open turn of a session."""
        assert self.gateway is not None
        sessions = {place: id for id, place in self.look().sessions.items()}
        session = sessions.get((key.channel, key.name))
        before = [t for t in self.model.disk.turns.values() if t.session == session and t.open]
        ids = {turn.id for turn in before}
        self.model.being_stopped |= ids
        try:
            stopped = await self.gateway.stop_turn(key)
        except StoreError:
            return
        finally:
            if self.alive:
                self.model.being_stopped -= ids
        if self.alive:
            self.model.hold(10, stopped == bool(before), f"stop_turn: {stopped}, open: {before}")
            for id in ids:
                state = self.model.disk.turns[id].state
                self.model.hold(10, state == "STOPPED", f"turn {id} was stopped, and is {state}")

    # ----- the platforms

    def _channel(self, name: str, connected: bool) -> MemoryChannel:
        channel = MemoryChannel(
            name,
            idempotent=self.world.idempotent[name],
            text_limit=self.world.text_limit,
            notices=True,
            connected=connected,
        )
        channel.before_send = self._sending
        return channel

    async def _sending(self, delivery: Delivery) -> None:
        try:
            await self._send(delivery)
        finally:
            if self.alive:
                self.model.sending_ended(trio.current_time())

    async def _send(self, delivery: Delivery) -> None:
        """A platform in the mood that it was told to be in, for this one text."""
        moods = self.world.moods[delivery.session.channel]
        mood = moods.popleft() if moods and self.alive else "kind"
        await trio.lowlevel.checkpoint()
        if mood == "hangs":
            self.hanging += 1
            try:
                await self._released.wait()
            finally:
                self.hanging -= 1
        if not self.alive:
            raise OSError("nobody is there")
        self.world.pulse += 1
        if mood in _MOODS:
            raise _MOODS[mood]()
        self.say(f"arrived: {delivery.key} {delivery.text!r}")
        self.model.arrives(delivery)
        if mood == "fails late":
            raise OSError("the line, after it arrived (a test)")

    def connect_all(self) -> None:
        """Who was late is there."""
        self.late.clear()
        for channel in self.channels.values():
            channel.connect()

    def request_stop(self, reason: ResumeReason, *, now: bool) -> None:
        """The host asks the gateway to stop."""
        if self.gateway is not None:
            self.gateway.request_stop(reason, now=now)

    def leave(self, how: str) -> None:
        """The host's block is left: in order, cancelled, or by a failure of its own."""
        if how == "cancel":
            self.scope.cancel()
        self.body_fails = how == "fail"
        self.leaving.set()

    def release(self) -> None:
        """What hangs in a platform goes on."""
        self._released.set()
        self._released = trio.Event()

    # ----- the end

    def calm_down(self) -> None:
        """Nothing keeps anybody any more."""
        self.connect_all()
        self.release()
        for puppet in list(self.puppets.values()):
            puppet.hurry()

    async def wait_quiet(self, rested: trio.Event) -> None:
        """Hand in what nobody has acknowledged, and wait until there is nothing to do."""
        for message in list(self.world.unsure):
            if message.channel == LOCAL or message.channel in self.channels:
                await self.hand_in(message)
        if self.gateway is not None:
            await self.gateway.wait_idle()
            rested.set()

    # ----- at rest

    @property
    def serving(self) -> bool:
        """Whether the gateway serves, and nobody has asked it to stop."""
        gateway = self.gateway
        return (
            gateway is not None
            and gateway.state.value is GatewayState.SERVING
            and gateway.stop_reason is None
        )

    def compare_at_rest(self) -> None:
        """While everybody is blocked: what the gateway counts is what stands on disk, and nobody
        waits who could go on."""
        gateway = self.gateway
        if gateway is None:
            waits_for_the_disk = self.now < self.trouble_until
            self.model.hold(2, waits_for_the_disk, "the boot is at rest, and nobody is served")
        if not self.serving or gateway is None:
            return
        record, stats, hold = self.look(), gateway.statistics(), self.model.hold
        mine = {id for id, (channel, _) in record.sessions.items() if self._has(channel)}
        open_messages = [m for m in record.messages.values() if not m.ended and m.session in mine]
        undelivered = [
            d for d in record.deliveries.values()
            if d.state in ("pending", "sending") and d.session in mine
        ]  # fmt: skip
        hold(6, stats["messages_open"] == len(open_messages), f"{stats}: {open_messages}")
        hold(7, stats["undelivered"] == len(undelivered), f"{stats}: {undelivered}")
        busy = {message.session for message in open_messages}
        hold(6, stats["sessions_open"] >= len(busy), f"{stats}: {busy} are open")
        self._compare_slots(record, stats)
        if self.now >= self.trouble_until:
            self._nobody_waits(record, stats)

    def _has(self, channel: str) -> bool:
        return channel == LOCAL or channel in self.channels

    def _compare_slots(self, record: Record, stats: dict[str, int]) -> None:
        assert self.gateway is not None
        here = {info.id for info in self.gateway.turns()}
        running = {
            t.id for t in record.turns.values() if t.state == "RUNNING" and t.epoch == record.epoch
        }
        self.model.hold(3, running <= here, f"{running} are RUNNING, alive are {here}")
        taken = self.world.settings.limits.turns - stats["slots_free"]
        troubled = self.now < self.trouble_until
        right = len(here) <= taken if troubled else len(here) == taken
        self.model.hold(6, right and stats["turns_running"] == len(here), f"{stats}: {here}")

    def _nobody_waits(self, record: Record, stats: dict[str, int]) -> None:
        """There is a slot, and no session that could use it."""
        assert self.gateway is not None
        if stats["slots_free"] <= 0:
            return
        busy = {(i.session.channel, i.session.name) for i in self.gateway.turns()}
        busy |= {record.sessions[t.session] for t in record.turns.values() if t.open}
        for message in record.messages.values():
            place = record.sessions[message.session]
            if message.state == "queued" and place not in busy and self._reaches(place[0]):
                self.model.hold(2, False, f"{message.id} waits in {place} for nobody: {stats}")
        if self.connected >= self.channels.keys():
            self._nobody_waits_to_resume(record)

    def _nobody_waits_to_resume(self, record: Record) -> None:
        assert self.gateway is not None
        here = {info.id for info in self.gateway.turns()}
        if len(here & self.model.resumed) >= self.world.settings.resume.concurrency:
            return
        for turn in record.turns.values():
            waits = turn.state == "RESUME_PENDING" and turn.crashes < SUSPECT
            if waits and self._has(record.sessions[turn.session][0]):
                self.model.hold(5, False, f"{turn} does not resume, and there is room")

    def _reaches(self, channel: str) -> bool:
        return channel == LOCAL or channel in self.connected


_MOODS: Final[dict[str, Callable[[], Exception]]] = {
    "asks to wait": lambda: RetryLater(7),
    "blocks": lambda: Undeliverable("blocked (a test)"),
    "fails": lambda: OSError("the line (a test)"),
    "is gone": lambda: ChannelEnded("gone (a test)"),
}


def _short(event: Event) -> str:
    """The fields of an event, but for tracebacks and what a delivery carries."""
    shown: dict[str, Any] = {
        field.name: getattr(event, field.name)
        for field in attrs.fields(type(event))
        if field.name != "traceback"
    }
    if "delivery" in shown:
        shown["delivery"] = shown["delivery"].key
    return ", ".join(f"{name}={value!s}" for name, value in shown.items())
