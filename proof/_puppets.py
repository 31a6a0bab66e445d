"""Agents on strings: each does what it is told, one order at a time, and waits for the next.

While it obeys, it looks at what the gateway lets it see, and compares: whether a step is
remembered, repeated or in doubt (promise 8), whether what it said and kept is on disk when the
gateway says so (promises 6 and 7).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, NoReturn, Protocol, TypeAlias

import attrs
import trio

from trio_gateway import AgentMisuse, GatewayStopping, StepInDoubt, Turn
from trio_gateway.testing._model import Model
from trio_gateway.testing._snapshot import Record, StepRow

Order: TypeAlias = Callable[["Puppet"], Awaitable[None]]

StepKey: TypeAlias = tuple[int, str]
"""A turn, and the name of one of its steps."""

FREE: Final = "free"
IN_A_STEP: Final = "in a step"
BUSY: Final = "busy"


class AgentFailed(Exception):
    """The agent's own failure."""


class _Over(BaseException):
    """The agent returns this, from wherever it is."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer


@attrs.define(eq=False)
class Memory:
    """What the world outside knows of agents, over all lives: no death takes that back."""

    ran: Counter[StepKey] = attrs.field(factory=Counter[StepKey])
    """How often the function of each step was called."""
    done: set[StepKey] = attrs.field(factory=set[StepKey])
    """Steps that have returned to their agent."""
    kept: dict[int, int] = attrs.field(factory=dict[int, int])
    """The checkpoint of each turn that was kept for sure."""
    tried: dict[int, int] = attrs.field(factory=dict[int, int])
    """The checkpoint of each turn that may be kept."""
    said: dict[tuple[int, int], set[str]] = attrs.field(factory=dict[tuple[int, int], "set[str]"])
    """What each turn has said for sure, as its first words, its second, and so on."""


class Stage(Protocol):
    """Where a puppet plays: one life of a gateway."""

    @property
    def alive(self) -> bool:
        """False: nothing that happens here happens any more."""
        ...

    @property
    def calm(self) -> bool:
        """Whether agents are to end by themselves."""
        ...

    @property
    def model(self) -> Model:
        """Who is told what is broken."""
        ...

    @property
    def memory(self) -> Memory:
        """What agents have done, in all lives."""
        ...

    @property
    def faults(self) -> int:
        """How often the disk has failed."""
        ...

    def look(self) -> Record:
        """All that stands on disk."""
        ...

    def say(self, what: str) -> None:
        """For whoever has to find out what happened."""
        ...


@attrs.define(eq=False)
class Puppet:
    """One attempt of one turn."""

    stage: Stage
    turn: Turn
    place: str = BUSY
    last_words: str | None = None
    """What it answers its cancellation with."""
    _uses: Counter[str] = attrs.field(factory=Counter[str])
    _ended: set[StepKey] = attrs.field(factory=set[StepKey])
    """Steps whose function has returned, in this attempt."""
    _words: int = 0
    _send: trio.MemorySendChannel[Order] = attrs.field(init=False)
    _receive: trio.MemoryReceiveChannel[Order] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[Order](10)

    def order(self, order: Order) -> None:
        """Have it do that next."""
        self._send.send_nowait(order)

    def hurry(self) -> None:
        """Have it look up: it is calm now, or nothing happens here any more."""
        self.order(go_on)

    # ----- the agent

    async def play(self) -> Any:
        """The agent: obey, until told to end."""
        self._compare_checkpoint()
        try:
            await self._obey()
        except _Over as over:
            return over.answer
        except trio.Cancelled:
            if self.last_words is None or not self.stage.alive:
                raise
            return self.last_words

    async def _obey(self) -> NoReturn:
        while True:
            order = await self._next(FREE)
            try:
                await order(self)
            except (AgentMisuse, GatewayStopping) as error:
                self._must_be_over(error)

    async def _next(self, place: str) -> Order:
        if not self.stage.alive:
            raise _Over(None)
        if self.stage.calm:
            await trio.sleep(0.3)
            return go_on if place == IN_A_STEP else finish("at last")
        self.place = place
        try:
            return await self._receive.receive()
        finally:
            self.place = BUSY

    def _must_be_over(self, error: Exception) -> None:
        """A turn may be told that it is over only if it is."""
        if self.stage.alive:
            turn, model = self.turn, self.stage.model
            row = self.stage.look().turns.get(turn.id)
            over = row is None or not row.open or model.stop_at is not None
            model.hold(6, over, f"{turn!r} is {row}, and is told: {error}")

    # ----- steps

    async def step(self, name: str, effect: str) -> None:
        """Do a remembered step."""
        self._uses[name] += 1
        n = self._uses[name]
        key = (self.turn.id, name if n == 1 else f"{name}#{n}")
        found = self.stage.look().steps.get(key) if self.stage.alive else None
        called, faults = Counter[StepKey](), self.stage.faults
        try:
            work = partial(self._work, key, effect, called)
            result = await self.turn.step(work, name=name, effect=effect)
        except trio.Cancelled:
            if self.stage.alive and key in self._ended and faults == self.stage.faults:
                self._must_be_done(key)
            raise
        except StepInDoubt:
            self._is_in_doubt(key, effect, found)
        except AgentFailed:
            self.stage.say(f"step {key} has failed")
        else:
            self._has_returned(key, effect, found, called[key], result)

    async def _work(self, key: StepKey, effect: str, called: Counter[StepKey]) -> str:
        called[key] += 1
        if self.stage.alive:
            memory, hold = self.stage.memory, self.stage.model.hold
            memory.ran[key] += 1
            hold(8, key not in memory.done, f"step {key} was done, and is done again")
            silently = effect == "unsafe" and memory.ran[key] > 1
            hold(8, not silently, f"unsafe step {key} is repeated, and nobody was told")
        order = await self._next(IN_A_STEP)
        await order(self)
        self._ended.add(key)
        return f"{key[1]} of {key[0]}"

    def _is_in_doubt(self, key: StepKey, effect: str, found: StepRow | None) -> None:
        if self.stage.alive:
            model = self.stage.model
            begun = found is not None and found.state == "begun" and effect == "unsafe"
            model.hold(8, begun, f"step {key} is in doubt, on disk is {found}")
            model.seen["a step in doubt"] += 1

    def _has_returned(
        self, key: StepKey, effect: str, found: StepRow | None, calls: int, result: str
    ) -> None:
        if not self.stage.alive:
            return
        model, memory = self.stage.model, self.stage.memory
        if found is not None and found.state == "done":
            model.hold(8, calls == 0, f"step {key} was done, and is done again")
            model.hold(8, result == json.loads(str(found.result)), f"step {key}: {result!r}")
            model.seen["a step was remembered"] += 1
        else:
            doubtful = found is not None and effect == "unsafe"
            model.hold(8, calls == 1, f"step {key} returned after {calls} calls")
            model.hold(8, not doubtful, f"step {key} was begun before, and is not in doubt")
        self._must_be_done(key)
        memory.done.add(key)

    def _must_be_done(self, key: StepKey) -> None:
        """What has ended is on disk, also when its turn was cancelled meanwhile; and it counts as
        progress, if it was done here."""
        step = self.stage.look().steps.get(key)
        done = step is not None and step.state == "done"
        self.stage.model.hold(8, done, f"step {key} has ended, and is {step}")
        if key in self._ended:
            self._has_progressed()

    def _has_progressed(self) -> None:
        """Planned interruptions are counted anew from here (promise 9)."""
        row = self.stage.look().turns[self.turn.id]
        counts = row.state == "RUNNING" and row.interruptions > 0
        self.stage.model.hold(9, not counts, f"{row} got further, and is still counted")

    # ----- saying and keeping

    async def say(self, text: str) -> None:
        """Say something on the way."""
        self._words += 1
        before = self._parts_on_disk() if self.stage.alive else 0
        await self.turn.say(text)
        if self.stage.alive:
            said_before = self.stage.memory.said.setdefault((self.turn.id, self._words), set())
            twice = text in said_before and self._parts_on_disk() > before
            self.stage.model.hold(7, not twice, f"{self.turn!r} said {text!r} again: it is heard")
            said_before.add(text)
            on_disk = self.stage.look().deliveries.values()  # in the order in which they were made
            said = "".join(d.text for d in on_disk if (d.turn, d.kind) == (self.turn.id, "say"))
            self.stage.model.hold(7, text in said, f"{self.turn!r} said {text!r}: not on disk")

    def _parts_on_disk(self) -> int:
        deliveries = self.stage.look().deliveries.values()
        return sum((d.turn, d.kind) == (self.turn.id, "say") for d in deliveries)

    async def checkpoint(self) -> None:
        """Keep the next number."""
        memory, turn = self.stage.memory, self.turn.id
        value = memory.tried.get(turn, 0) + 1
        if self.stage.alive:
            memory.tried[turn] = value
        await self.turn.checkpoint(value)
        if self.stage.alive:
            memory.kept[turn] = value
            self._has_progressed()

    def _compare_checkpoint(self) -> None:
        if self.stage.alive:
            memory, id = self.stage.memory, self.turn.id
            found: int | None = self.turn.checkpointed
            allowed = (memory.kept.get(id), memory.tried.get(id))
            known = found in allowed
            self.stage.model.hold(8, known, f"{self.turn!r} kept {allowed}, and finds {found}")
            if found is not None:
                memory.kept[id] = memory.tried[id] = found

    async def take(self) -> None:
        """Take a message that waits in the session into this turn."""
        before = self.turn.messages
        taken = await self.turn.take()
        if self.stage.alive:
            grown = self.turn.messages == ((*before, taken) if taken else before)
            self.stage.model.hold(6, grown, f"{self.turn!r} took {taken}, has {self.turn.messages}")
            self.stage.model.seen["a turn took a message"] += taken is not None

    # ----- how it takes its end

    async def shield(self) -> None:
        """Notice no cancellation from here on."""
        with trio.CancelScope(shield=True):
            await self._obey()

    async def ask_restart(self) -> None:
        """Ask the gateway to restart when this turn has settled."""
        self.turn.request_restart()

    async def look_back(self) -> None:
        """Read the conversation."""
        await self.turn.history()


async def go_on(puppet: Puppet) -> None:
    """Do nothing more where it is: a step ends."""


# ----- orders with something to say


def finish(answer: Any) -> Order:
    """Return that."""

    async def order(puppet: Puppet) -> None:
        raise _Over(answer)

    return order


def fail(error: BaseException) -> Order:
    """Raise that."""

    async def order(puppet: Puppet) -> None:
        raise error

    return order
