"""The moves of `machine`: everything that can happen to a gateway, one at a time.

Each move is made while everybody is blocked, and followed until everybody is blocked again. Then
whatever the model has found is a failure, and what the gateway counts is compared with the disk.

A story is a list of moves with their arguments. Whatever an argument can be is a list of choices,
the plainest first. So a story can be kept as JSON, played again, and made shorter and plainer. A
move that is not possible where it stands is passed over: what is left of a story is a story.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any, Final, TypeAlias

import attrs

from trio_gateway import (
    Busy,
    DeliveryRules,
    Limits,
    Message,
    ResumeReason,
    ResumeRules,
    SessionKey,
    Settings,
)
from trio_gateway._messages import LOCAL
from trio_gateway.testing import violations
from trio_gateway.testing._seeded import Death, always
from trio_gateway.testing._snapshot import TurnRow

from ._guest_lives import PLATFORMS, Life, World
from ._puppets import FREE, IN_A_STEP, AgentFailed, Order, Puppet, fail, finish, go_on

LOOK_EVERY: Final = 5
"""Moves between two looks at every row of the store."""

Move: TypeAlias = tuple[str, dict[str, Any]]
"""Name and arguments."""

Choices: TypeAlias = Mapping[str, Sequence[Any]]

SESSIONS: Final = ["ada", "bob"]
TEXTS: Final = ["hello"] * 6 + ["/stop", "/new", "/retry", "/status"]
BATCHES: Final = [
    list(texts)
    for size in (1, 2, 3)
    for texts in product(["hello", "/stop", "/retry"], repeat=size)
]
WHICH: Final = range(8)
"""One of those that there are, counted round."""

STEPS: Final = {"look": "safe", "note": "idempotent", "charge": "unsafe"}
"""Steps, and what happens outside when they run twice."""

BAD: Final[dict[str, Callable[[Message], Message]]] = {
    "no session": lambda message: attrs.evolve(message, session=""),
    "a long id": lambda message: attrs.evolve(message, id="x" * 2000),
    "half a character": lambda message: attrs.evolve(message, text="\ud800"),
    "a long text": lambda message: attrs.evolve(message, text="x" * ((1 << 20) + 1)),
}

FAILURES: Final[dict[str, Callable[[], BaseException]]] = {
    "an error": lambda: AgentFailed("the agent's own"),
    "a group": lambda: ExceptionGroup("of a nursery", [AgentFailed("the agent's own")]),
    "an exit": lambda: SystemExit(3),
}

DEEDS: Final[dict[str, Order]] = {
    "answer": finish("yes"),
    "say": lambda puppet: puppet.say("on it"),
    "take": Puppet.take,
    "checkpoint": Puppet.checkpoint,
    "fail": fail(AgentFailed("the agent's own")),
}
"""What an agent can do in one breath with something else."""

ANSWERS: Final = ["yes", "an answer that takes more than one part to be said", "", None, 7]

MOODS: Final = ["fails", "fails late", "asks to wait", "blocks", "hangs", "is gone"]

SETTINGS: Final[Choices] = {
    "busy": ["queue", "queue", "collect", "interrupt", "steer", "reject"],
    "slots": [10, 2, 1],
    "grace": [0.0, 0.3, 2.0],
    "budget": [8.0, 1.0],
    "at_once": [20, 1],
    "max_crashes": [3, 3, 100],
    "max_interruptions": [10, 2],
    "within": [None, 3600, 300],
    "time_limit": [None, None, 100.0],
    "notices": [False, True],
    "knowing": [["memory", "other"], ["memory"], []],
    "text_limit": [None, 20],
    "schedule": range(1000),
}
"""What kinds of gateways there are. `knowing`: which platforms know a key again. `schedule`: how
Trio's dice are loaded."""


class PromiseBroken(AssertionError):
    """What the model has found."""


# ----- what is possible when


def _alive(story: Story) -> bool:
    return story.world.life is not None


def _dead(story: Story) -> bool:
    return story.world.life is None


def _open(story: Story) -> bool:
    """Inside the gateway's block."""
    life = story.world.life
    return life is not None and life.gateway is not None


def _has(place: str) -> Callable[[Story], bool]:
    """Whether an agent is there that can be told something."""
    return lambda story: bool(story.puppets(place))


@attrs.frozen
class Kind:
    """One kind of move: when it is possible, what its arguments can be, and what it does."""

    possible: Callable[[Story], bool]
    choices: Choices
    play: Callable[..., None]
    weight: int
    """How often it is chosen, compared to others."""


KINDS: Final[dict[str, Kind]] = {}
"""All kinds of moves, by name."""

_Play: TypeAlias = Callable[..., None]


def move(
    possible: Callable[[Story], bool], weight: int = 1, **choices: Sequence[Any]
) -> Callable[[_Play], _Play]:
    """The decorated method is a move."""

    def decorate(play: _Play) -> _Play:
        KINDS[play.__name__] = Kind(possible, choices, play, weight)
        return play

    return decorate


# ----- the story


class Story:
    """One world, move by move. Begin it, play, end it, and close it in any case."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        memory = Path("/dev/shm")
        self._folder = Path(
            tempfile.mkdtemp(prefix="machine-", dir=memory if memory.exists() else None)
        )
        self.told: list[Move] = [("begin", dict(settings))]
        self.acted = 0
        self._pulse = 0
        self._schedule = int(settings["schedule"])
        self.world = _world(self._folder, **settings)

    def begin(self) -> None:
        """The first boot. Raises `PromiseBroken`."""
        self.world.boot(PLATFORMS, (), self._schedule)
        self._look()

    def close(self) -> None:
        """What still lives is let go, and nothing is left behind."""
        try:
            self.world.close()
        finally:
            shutil.rmtree(self._folder)

    @property
    def moves(self) -> int:
        """How many were made."""
        return len(self.told) - 1

    def play(self, name: str, arguments: Mapping[str, Any]) -> None:
        """Make a move, if it is possible here. Raises `PromiseBroken`."""
        kind = KINDS[name]
        if not kind.possible(self):
            return
        self.told.append((name, dict(arguments)))
        held = self.world.hold
        kind.play(self, **arguments)
        if held:
            self.world.hold = min(held, self.world.hold) - 1
            if self.world.hold <= 0:
                self.world.go()
        self._look()

    def _look(self) -> None:
        world = self.world
        self.acted += world.pulse != self._pulse
        self._pulse = world.pulse
        if world.life is not None:
            world.life.compare_at_rest()
            if self.moves % LOOK_EVERY == 0:
                world.model.broken += [f"the store: {what}" for what in violations(world.store)]
        self._must_hold()

    def end(self) -> None:
        """Everything comes to its end. Raises `PromiseBroken`."""
        self.world.come_to_the_end()
        self._must_hold()

    def _must_hold(self) -> None:
        if broken := self.world.model.broken:
            raise PromiseBroken("\n".join(broken[:5]))

    # ----- lives

    @move(
        _dead,
        served=[["memory", "other"], ["memory", "other"], ["memory"]],
        late=[[], [], [], ["other"], ["memory", "other"]],
        pause=[0.0, 0.0, 1.0, 60.0, 600.0, 7200.0],
        wall_hours=[0, 0, 0, 1, -1, 24, -24],
        new_machine=[False, False, False, True],
        schedule=range(1000),
    )
    def boot(
        self,
        served: list[str],
        late: list[str],
        pause: float,
        wall_hours: int,
        new_machine: bool,
        schedule: int,
    ) -> None:
        """A new process, some time after the last."""
        world = self.world
        world.now += pause
        world.wall.jump(timedelta(hours=wall_hours))
        world.wall.machine += "'" * new_machine
        world.boot(served, late, schedule)

    @move(
        _open,
        how=["ask", "ask", "ask", "now", "leave", "cancel", "fail"],
        reason=["shutdown", "restart"],
    )
    def stop(self, how: str, reason: str) -> None:
        """The host asks the gateway to stop, for the first time or once more; or its block is left,
        cancelled, or fails."""
        if how in ("ask", "now"):
            self.world.move(lambda life: life.request_stop(ResumeReason(reason), now=how == "now"))
        else:
            self.world.move(lambda life: life.leave(how))

    @move(
        _alive,
        what=["rest", "commit", "commit", "step"],
        moment=["after", "before"],
        count=range(1, 9),
        in_stop=[False, True],
    )
    def die(self, what: str, moment: str, count: int, in_stop: bool) -> None:
        """Now, while everybody is blocked. Or soon: at some commit, or before some step of some
        task, counted from here, or from the stop."""
        counted = self.world.stops if in_stop else always
        if what == "rest":
            self.world.kill()
        elif what == "commit":
            self.world.death = Death("commit", count, moment, counted)
        else:
            self.world.death = Death("step", count * 7, "after", counted)

    @move(
        lambda story: _open(story) and not story.world.hold,
        count=[2, 3],
        apart=[0, 0, 1, 2, 3, 4, 6],
    )
    def in_one_breath(self, count: int, apart: int) -> None:
        """The next moves are made in one breath: nobody comes to rest between them. Or nearly so:
        so many turns of Trio's loop apart."""
        self.world.hold, self.world.apart = count, apart

    # ----- people

    def reachable(self) -> list[str]:
        """Channels over which people can write."""
        life = self.world.life
        if life is None or life.gateway is None:
            return []
        return [*sorted(life.connected), LOCAL]

    def _where(self, which: int) -> str:
        channels = self.reachable()
        return channels[which % len(channels)]

    @move(_open, 3, where=WHICH, session=SESSIONS, text=TEXTS, bad=[None] * 16 + list(BAD))
    def write(self, where: int, session: str, text: str, bad: str | None) -> None:
        """Somebody writes, in a chat or through the host; now and then what is no message."""
        if bad is None:
            self._hand_in(self.world.message(self._where(where), session, text))
            return
        self.world.sent += 1
        good = Message(
            session=session, id=f"m{self.world.sent}", text=text, channel=self._where(where)
        )
        self._hand_in(BAD[bad](good), bad=True)

    def sent_before(self) -> list[Message]:
        """What can be sent again, newest first."""
        channels = self.reachable()
        return [m for m in reversed(self.world.known) if m.channel in channels]

    @move(lambda story: bool(story.sent_before()), which=WHICH)
    def write_again(self, which: int) -> None:
        """A platform sends again what it has sent before."""
        messages = self.sent_before()
        self._hand_in(messages[which % len(messages)])

    @move(
        lambda story: len(story.reachable()) > 1,
        where=WHICH,
        texts=BATCHES,
        mixed=[False, True],
        twice=[False, True],
    )
    def write_batch(self, where: int, texts: list[str], mixed: bool, twice: bool) -> None:
        """Several at once, and the cursor that covers them."""
        world = self.world
        channel = self.reachable()[where % (len(self.reachable()) - 1)]
        batch = [
            world.message(channel, SESSIONS[number % 2 if mixed else 0], text)
            for number, text in enumerate(texts)
        ]
        # Where a busy session refuses, the cursor covers what was refused, and that is right.
        refuses = world.settings.busy is Busy.REJECT
        cursor = 0 if refuses else world.next_cursor(channel, batch)
        self._hand_in(*batch, *batch[:twice], cursor=cursor)

    def _hand_in(self, *messages: Message, cursor: int = 0, bad: bool = False) -> None:
        self.world.start(lambda life: life.hand_in(*messages, cursor=cursor, bad=bad))

    # ----- the host

    @move(_open, session=SESSIONS, text=TEXTS, again=[False, False, True], which=WHICH)
    def ask(self, session: str, text: str, again: bool, which: int) -> None:
        """The host asks, and waits for the answer; also for what it has handed in before."""
        before = [m for m in reversed(self.world.known) if m.channel == LOCAL]
        if again and before:
            message = before[which % len(before)]
        else:
            message = self.world.message(LOCAL, session, text)
        self.world.start(lambda life: life.ask(message))

    @move(lambda story: _alive(story) and bool(story.life.askers), which=WHICH)
    def give_up_asking(self, which: int) -> None:
        """Who asked does not wait any longer."""
        askers = self.life.askers
        scope = askers[which % len(askers)]
        self.world.pulse += 1
        self.world.move(lambda life: scope.cancel())

    @move(lambda story: _open(story) and bool(story.turns()), which=WHICH)
    def stop_turn(self, which: int) -> None:
        """The host ends a session's turn for good."""
        turns = self.turns()
        key = SessionKey(*self.life.look().sessions[turns[which % len(turns)].session])
        self.world.start(lambda life: life.stop_turn(key))

    def turns(self) -> list[TurnRow]:
        """The open ones."""
        return [turn for turn in self.world.model.disk.turns.values() if turn.open]

    # ----- agents

    @property
    def life(self) -> Life:
        """The living one."""
        assert self.world.life is not None
        return self.world.life

    def puppets(self, place: str) -> list[Puppet]:
        """The agents that can be told something there, oldest turn first."""
        life = self.world.life
        if life is None:
            return []
        return [puppet for _, puppet in sorted(life.puppets.items()) if puppet.place == place]

    def _tell(self, which: int, order: Order, place: str = FREE) -> None:
        puppets = self.puppets(place)
        puppet = puppets[which % len(puppets)]
        self.world.pulse += 1
        self.world.move(lambda life: puppet.order(order))

    @move(_has(FREE), 2, which=WHICH, text=["on it", "still on it, and on it"])
    def agent_says(self, which: int, text: str) -> None:
        """Something on the way."""
        self._tell(which, lambda puppet: puppet.say(text))

    @move(_has(FREE), 2, which=WHICH, name=list(STEPS))
    def agent_begins_step(self, which: int, name: str) -> None:
        """A remembered step, which lasts until it is told to end."""
        self._tell(which, lambda puppet: puppet.step(name, STEPS[name]))

    @move(_has(FREE), 2, which=WHICH)
    def agent_charges(self, which: int) -> None:
        """A step that must not be repeated unasked."""
        self._tell(which, lambda puppet: puppet.step("charge", STEPS["charge"]))

    @move(_has(IN_A_STEP), 2, which=WHICH)
    def agent_ends_step(self, which: int) -> None:
        """The step's function returns."""
        self._tell(which, go_on, IN_A_STEP)

    @move(_has(IN_A_STEP), 2, which=WHICH)
    def agent_fails_in_step(self, which: int) -> None:
        """The step's function raises."""
        self._tell(which, fail(AgentFailed("its step")), IN_A_STEP)

    @move(_has(FREE), 2, which=WHICH)
    def agent_checkpoints(self, which: int) -> None:
        """It keeps how far it is."""
        self._tell(which, Puppet.checkpoint)

    @move(_has(FREE), which=WHICH, answer=ANSWERS)
    def agent_answers(self, which: int, answer: Any) -> None:
        """It returns its answer, or nothing, or what is no answer."""
        self._tell(which, finish(answer))

    @move(_has(FREE), which=WHICH)
    def agent_says_yes(self, which: int) -> None:
        """Mostly, it answers."""
        self._tell(which, finish("yes"))

    @move(_has(FREE), which=WHICH, kind=list(FAILURES))
    def agent_fails(self, which: int, kind: str) -> None:
        """It raises."""
        self._tell(which, fail(FAILURES[kind]()))

    @move(_has(FREE), 2, which=WHICH)
    def agent_asks_for_restart(self, which: int) -> None:
        """The gateway is to restart once this turn has settled."""
        self._tell(which, Puppet.ask_restart)

    @move(_has(FREE), 2, which=WHICH)
    def agent_takes(self, which: int) -> None:
        """It takes a message that waits, into its turn."""
        self._tell(which, Puppet.take)

    @move(_has(FREE), which=WHICH)
    def agent_looks_back(self, which: int) -> None:
        """It reads the conversation."""
        self._tell(which, Puppet.look_back)

    @move(_has(FREE), 2, which=WHICH)
    def agent_swallows_cancellation(self, which: int) -> None:
        """It will not notice that it is cancelled."""
        self._tell(which, Puppet.shield)

    @move(_has(FREE), which=WHICH)
    def agent_will_answer_cancellation(self, which: int) -> None:
        """It will return an answer when it is cancelled."""
        puppets = self.puppets(FREE)
        puppets[which % len(puppets)].last_words = "in a hurry"

    @move(
        lambda story: _open(story) and bool(story.puppets(FREE) or story.puppets(IN_A_STEP)),
        3,
        which=WHICH,
        does=list(DEEDS),
        rival=["/stop", "hello", "stop_turn", "stop", "stop now", "cut", "goes on"],
        first=[False, True],
        apart=[0, 0, 0, 1, 2, 3, 4, 6, 8],
    )
    def agent_races(self, which: int, does: str, rival: str, first: bool, apart: int) -> None:
        """An agent does something, or its step ends; and in one breath with it, or nearly so,
        something happens to its turn."""
        puppets = self.puppets(IN_A_STEP) or self.puppets(FREE)
        puppet = puppets[which % len(puppets)]
        order = go_on if puppet.place == IN_A_STEP else DEEDS[does]
        self.world.hold, self.world.apart = 2, apart
        if first:
            self._rival(rival, puppet.turn.session)
        self.world.move(lambda life: puppet.order(order))
        if not first:
            self._rival(rival, puppet.turn.session)
        self.world.go()

    def _rival(self, name: str, session: SessionKey) -> None:
        move = self.world.move
        if name in ("stop", "stop now"):
            move(lambda life: life.request_stop(ResumeReason.SHUTDOWN, now=name == "stop now"))
        elif name == "stop_turn":
            self.world.start(lambda life: life.stop_turn(session))
        elif name == "goes on":
            move(Life.release)
        elif session.channel not in self.reachable():
            return
        elif name != "cut":
            self._hand_in(self.world.message(session.channel, session.name, name))
        elif session.channel != LOCAL:
            move(lambda life: life.channels[session.channel].break_down(OSError("a test")))

    # ----- platforms

    @move(_alive, channel=PLATFORMS, trouble=[*MOODS, "cut"], texts=[1, 2, 3])
    def platform_trouble(self, channel: str, trouble: str, texts: int) -> None:
        """How a platform takes the next texts; or its line is cut, for some seconds."""
        if trouble != "cut":
            self.world.moods[channel].extend([trouble] * texts)
        elif channel in self.life.connected:
            self.world.move(lambda life: life.channels[channel].break_down(OSError("a test")))

    @move(lambda story: _alive(story) and story.life.hanging > 0)
    def platform_goes_on(self) -> None:
        """What hung in it gets through."""
        self.world.move(Life.release)

    @move(lambda story: _alive(story) and bool(story.life.late))
    def platform_connects(self) -> None:
        """Who was late is there."""
        self.world.move(Life.connect_all)

    # ----- the disk, and time

    @move(_alive, moment=["before", "before", "after"], kind=["full", "EIO"], commits=[1, 1, 2, 4])
    def disk_fails(self, moment: str, kind: str, commits: int) -> None:
        """The next commits fail, or stand and report an error all the same."""
        self.world.faults.extend([(moment, kind)] * commits)

    @move(
        _alive,
        seconds=[0.1, 0.4, 1.0, 3.0, 12.0, 40.0, 200.0, 4000.0],
        wall_hours=[0, 0, 0, 0, 0, 0, 1, -1, 24, -24],
    )
    def pass_time(self, seconds: float, wall_hours: int) -> None:
        """Time goes by; and now and then somebody has set the wall clock."""
        self.world.wall.jump(timedelta(hours=wall_hours))
        self.world.pass_time(seconds)


def _world(
    folder: Path,
    *,
    busy: str,
    slots: int,
    grace: float,
    budget: float,
    at_once: int,
    max_crashes: int,
    max_interruptions: int,
    within: int | None,
    time_limit: float | None,
    notices: bool,
    knowing: list[str],
    text_limit: int | None,
    schedule: int,
) -> World:
    settings = Settings(
        busy=Busy(busy),
        grace=grace,
        budget=budget,
        limits=Limits(turns=slots),
        resume=ResumeRules(
            concurrency=at_once,
            max_crashes=max_crashes,
            max_interruptions=max_interruptions,
            within=None if within is None else timedelta(seconds=within),
        ),
        delivery=DeliveryRules(max_tries=3, max_delay=20.0, timeout=10.0),
        time_limit=time_limit,
        notices=notices,
    )
    return World(folder, settings, {name: name in knowing for name in PLATFORMS}, text_limit)
