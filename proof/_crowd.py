"""A thousand conversations on one store, for all its lives: what people send, and what they hear.

A `Platform` whose people do everything that people do: they write while they are being answered
(with whatever policy the gateway has just then), they say /stop, they are refused and try again or
give up. So it takes more to keep an account; see `_reckoning`.
"""

from __future__ import annotations

import json
from typing import Any, Final

import attrs

from ._platform import Platform

AGENT: Final = '''
import os
import random

import trio

from trio_gateway import StepInDoubt

LIFE = os.environ["LIFE"]
STEER = os.environ["TRIO_GATEWAY_TURNS__BUSY"] == "steer"
NOTES = os.open(os.environ["EFFECTS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def note(*words):
    os.write(NOTES, " ".join(map(str, words)).encode() + b"\\n")


async def look(id):
    await trio.sleep(random.random() * 0.01)
    return f"seen {id}"


async def shoot(turn, id):
    note("shot", turn.id, id)
    await trio.sleep(random.random() * 0.01)
    return "hit"


async def answer(turn, message):
    """Do what a message says; whether something is in doubt."""
    kind, id = message.text, message.id
    if kind == "slow":
        await trio.sleep(random.random() * 0.1)
    if kind == "nap":
        await trio.sleep(random.random())
    if kind == "says":
        await turn.say(f"on it: {id}")
    if kind == "recalls":
        assert len(await turn.history(5)) <= 5
    if kind == "keeps":
        kept = turn.checkpointed
        assert kept is None or kept == {"turn": turn.id}, kept
        await turn.checkpoint({"turn": turn.id})
    if kind == "shows":
        turn.progress(f"working on {id}")
    if kind == "restarts":
        turn.request_restart()
    if kind == "fails":
        raise RuntimeError(f"failed: {id}")
    if kind == "steps":
        assert await turn.step(look, id, name=f"look {id}") == f"seen {id}"
        try:
            await turn.step(shoot, turn, id, name=f"shoot {id}", effect="unsafe")
        except StepInDoubt:
            return True
    return False


async def agent(turn):
    reason = turn.resumed.reason if turn.resumed else "fresh"
    who = (LIFE, turn.id, turn.attempt, turn.session.name)
    note("began", *who, reason)
    try:
        doubt = False
        for message in turn.messages:
            doubt |= await answer(turn, message)
        if STEER and turn.text in ("slow", "nap"):
            with trio.move_on_after(0.05):
                async for message in turn.arrivals():
                    note("took", *who, message.id)
                    doubt |= await answer(turn, message)
        ids = " ".join(message.id for message in turn.messages)
        return f"in doubt: {ids}" if doubt else f"re: {ids}"
    finally:
        note("over", *who)
'''
"""Does what each of a turn's messages says, and notes in which life, turn and attempt that was."""

SESSIONS: Final = tuple(f"s{number}" for number in range(1000))
BUSY_ONES: Final = 5
"""Sessions in which people write faster than they are answered, for a while; then others do."""

FOR_A_WHILE: Final = 2_000
"""Messages."""

KINDS: Final = {
    "plain": 30, "slow": 20, "says": 10, "steps": 10, "recalls": 4, "keeps": 4, "shows": 4,
    "nap": 3, "fails": 1, "/stop": 8, "/status": 1, "/new": 1,
}  # fmt: skip
"""What people write, and how often."""

OPEN_AT_ONCE: Final = 150
"""Messages that wait for an answer, over all sessions."""

REFUSED_BUSY: Final = "busy with the message before"
REFUSED_CLOSING: Final = "the gateway is closing"


@attrs.frozen
class Heard:
    """A reply, as it was heard first."""

    session: str
    text: str
    about: tuple[str, ...]
    final: bool
    attempt: int


@attrs.define(eq=False)
class Crowd(Platform):
    """The people of one store."""

    life: int = 0
    policy: str = "queue"
    stopping: bool = False
    """Whether this life was told to stop."""
    unacknowledged: dict[str, None] = attrs.field(factory=dict[str, None])
    """In the order in which they were sent first."""
    open: dict[str, dict[str, None]] = attrs.field(factory=dict[str, dict[str, None]])
    """By session: what its people still wait for an answer to."""
    waiting: int = 0
    taken: list[str] = attrs.field(factory=list[str])
    """What was acknowledged as new, in the order of the acknowledgements."""
    refused: list[str] = attrs.field(factory=list[str])
    """In this life, and not sent again yet."""
    out_of_turn: set[str] = attrs.field(factory=set[str])
    """What may have been refused, and so may have been overtaken."""
    given_up: set[str] = attrs.field(factory=set[str])
    """Refused, and never sent again."""
    heard: dict[str, Heard] = attrs.field(factory=dict[str, Heard])
    """Every reply by its key, in order."""
    repeats: int = 0
    complaints: list[str] = attrs.field(factory=list[str])
    """What the gateway must not have said."""

    # ----- what people send

    def new(self, session: str, text: str) -> bytes:
        """A new message, as a line."""
        line = super().new(session, text)
        id = next(reversed(self.sent))
        self.unacknowledged[id] = None
        self.open.setdefault(session, {})[id] = None
        self.waiting += 1
        self._may_be_refused(id)
        return line

    def again(self, chance: float = 0.02) -> list[bytes]:
        """On a new connection: what nobody acknowledged, in order; and now and then what somebody
        did."""
        self.refused.clear()
        ids = list(self.unacknowledged)
        if self.taken and chance:
            ids += self.dice.choices(self.taken, k=self.dice.randrange(5))
        for id in ids:
            self._may_be_refused(id)
        self.sent_again += len(ids)
        return [self.line(id) for id in ids]

    def once_more(self) -> list[bytes]:
        """What was refused a moment ago."""
        ids, self.refused = self.refused, []
        self.sent_again += len(ids)
        return [self.line(id) for id in ids]

    def _may_be_refused(self, id: str) -> None:
        command = self.sent[id]["text"].startswith("/")
        if self.policy == "reject" and not command and id not in self.accepted:
            self.out_of_turn.add(id)

    def burst(self) -> list[bytes]:
        """What one of them writes: one message, or a few in a row."""
        first = len(self.sent) // FOR_A_WHILE * BUSY_ONES % len(SESSIONS)
        busy = SESSIONS[first : first + BUSY_ONES]
        session = self.dice.choice(busy if self.dice.random() < 0.5 else SESSIONS)
        count = self.dice.choice((1, 1, 2, 3))
        kinds = self.dice.choices(list(KINDS), list(KINDS.values()), k=count)
        return [self.new(session, kind) for kind in kinds]

    def top_up(self) -> list[bytes]:
        """As much as is missing to keep the gateway busy."""
        lines: list[bytes] = []
        with self.news:
            while self.waiting < OPEN_AT_ONCE:
                lines += self.burst()
            if self.refused and self.dice.random() < 0.3:
                lines += self.once_more()
        return lines

    # ----- what they hear

    def hear(self, line: bytes) -> None:
        """One line that the process wrote."""
        event = json.loads(line)
        with self.news:
            what = event["event"]
            if what == "accepted":
                self._accepted(event)
            elif what == "refused":
                self._refused(event)
            elif what == "reply":
                self._replied(event)
            elif what != "progress":
                self.complaints.append(f"life {self.life}: {event}")
            self.news.notify_all()

    def _accepted(self, event: dict[str, Any]) -> None:
        id = event["id"]
        if not event["duplicate"]:
            self.taken.append(id)
        self.accepted.add(id)
        self.unacknowledged.pop(id, None)

    def _refused(self, event: dict[str, Any]) -> None:
        id, why = event["id"], event["error"]
        closing = why.startswith(REFUSED_CLOSING)
        if not (closing and self.stopping) and not (
            why.startswith(REFUSED_BUSY) and self.policy == "reject"
        ):
            self.complaints.append(f"life {self.life}, {self.policy}: {event}")
        if id in self.accepted:
            self.complaints.append(f"life {self.life}: {event}, which had been accepted")
        elif not closing and self.dice.random() < 0.5:
            self.given_up.add(id)
            self.unacknowledged.pop(id, None)
            self._ended(id)
        elif not closing:
            self.refused.append(id)

    def _replied(self, event: dict[str, Any]) -> None:
        heard = Heard(
            event["session"],
            event["text"],
            tuple(event["in_reply_to"]),
            event["final"],
            event["attempt"],
        )
        before = self.heard.setdefault(event["key"], heard)
        if before is not heard:
            self.repeats += 1
            if before != heard:
                self.complaints.append(f"life {self.life}: {before} became {event}")
            if not event["repeat"]:
                self.complaints.append(f"life {self.life}: doubled, and does not say so: {event}")
        elif heard.final:
            self._answered(heard)

    def _answered(self, heard: Heard) -> None:
        for id in heard.about:
            self._ended(id)
            if heard.text == "Stopped.":
                # Whatever was before it has ended with it, unheard.
                older = [one for one in self.open[heard.session] if int(one[1:]) < int(id[1:])]
                for one in older:
                    self._ended(one)

    def _ended(self, id: str) -> None:
        if self.open.get(self.sent[id]["session"], {}).pop(id, 0) is None:
            self.waiting -= 1

    @property
    def idle(self) -> bool:
        """Whether everything that anybody still wants is acknowledged."""
        return not self.unacknowledged
