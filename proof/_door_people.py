"""Who talks to the HTTP door while its process is killed, stopped and started again, and what each
of them was told: one side of the account in `_door_account`.

    posters     messages, some waiting for the answer; again under the same id until answered
    hooks       signed webhooks; an old one now and then once more, as it was

Nobody sends a new message before the last one is acknowledged, and a session is one person's. Who
only listens is in `_door_followers`, who speaks OpenAI's API in `_door_openai`.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import random
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

import attrs
import trio

from ._door_wire import Address, Answer, Gone, Wire, connect

KINDS: Final = {"plain": 40, "slow": 20, "says": 12, "steps": 6, "nap": 2, "fails": 1, "child": 2}
"""What a message asks the agent to do, and how often."""

OPEN_AT_ONCE: Final = 100
"""Messages that wait for an answer, over all sessions: people are patient."""

LULL: Final = 0.02
"""Seconds for which somebody thinks, at the most, before the next message."""


@attrs.define
class Sent:
    """One message: what was sent, and what was said to that."""

    session: str
    text: str
    accepted: int = 0
    """How often it was called new."""
    duplicate: int = 0
    unanswered: int = 0
    """How often it was sent, as a whole, and nobody answered."""
    life: int = 0
    """In which it was acknowledged."""
    replies: list[str] | None = None
    """What was told to who waited for it."""
    order: int = 0
    """When it was acknowledged: before or after which others."""

    @property
    def acknowledged(self) -> bool:
        """Whether its sender was told that it is kept."""
        return self.accepted + self.duplicate > 0


@attrs.define(eq=False)
class Town:
    """Everybody at the door of one store, and what they know."""

    address: Address
    token: str
    secret: bytes
    dice: random.Random
    sent: dict[str, Sent] = attrs.field(factory=dict[str, Sent])
    """Every message, by its id, in the order in which they were sent first."""
    acknowledged: int = 0
    settled: set[str] = attrs.field(factory=set[str])
    """What followers were told to have ended."""
    figures: Counter[str] = attrs.field(factory=Counter[str])
    seen: Counter[str] = attrs.field(factory=Counter[str])
    complaints: list[str] = attrs.field(factory=list[str])
    """What the door must not have said."""
    life: int = 0
    stopping: bool = False
    """Whether this life was told to stop."""
    was_stopping: bool = False
    """Whether the one before was: what it said last may be heard only now."""
    closing_time: bool = False
    """Nobody begins anything new any more."""
    over: bool = False
    """All is answered: who follows leaves when the gateway does."""
    just_sent: trio.Event = attrs.field(factory=trio.Event)
    """Set, and made anew, each time that a request is about to leave."""

    def begin_life(self) -> None:
        """Another process."""
        self.life += 1
        self.was_stopping, self.stopping = self.stopping, False

    @property
    def leaves(self) -> bool:
        """Whether who speaks may be a gateway that leaves: only that may turn somebody away."""
        return self.stopping or self.was_stopping

    def complain(self, what: str) -> None:
        """Note what must not have been."""
        self.complaints.append(f"life {self.life}: {what}")

    def noted(self, id: str, session: str, text: str) -> Sent:
        """A message that is sent for the first time."""
        return self.sent.setdefault(id, Sent(session, text))

    def acknowledge(self, id: str, status: str) -> None:
        """A receipt."""
        sent = self.sent[id]
        if not sent.acknowledged:
            self.acknowledged += 1
            sent.life, sent.order = self.life, self.acknowledged
            if sent.unanswered:
                kept = "kept all the same" if status == "duplicate" else "not kept"
                self.seen[f"no answer, and {kept}"] += 1
            elif status == "duplicate":
                self.complain(f"{id} is called a duplicate, and was sent once")
        elif status == "accepted":
            self.complain(f"{id} is called new, and was known")
        if status == "accepted":
            sent.accepted += 1
        elif status == "duplicate":
            sent.duplicate += 1
        else:
            self.complain(f"{id}: a receipt says {status!r}")

    def turned_away(self, id: str, answer: Answer) -> None:
        """Anything but a receipt: only a gateway that leaves may do so."""
        if answer.status == 503 and self.leaves:
            self.figures["turned_away"] += 1
        else:
            self.complain(f"{id} was answered {answer}")

    def leaving(self) -> None:
        """A request is about to leave."""
        self.just_sent.set()
        self.just_sent = trio.Event()

    @property
    def too_many(self) -> bool:
        """Whether so much waits for an answer that nobody writes more."""
        return self.acknowledged - len(self.settled) > OPEN_AT_ONCE

    async def think(self) -> bool:
        """A pause before something new. False: there is nothing new any more."""
        await trio.sleep(self.dice.random() * LULL)
        while self.too_many and not self.closing_time:  # noqa: ASYNC110 - whoever hears of it
            await trio.sleep(LULL)
        return not self.closing_time

    async def wait_a_moment(self) -> None:
        """Before somebody who was cut off comes back."""
        await trio.sleep(0.02 + self.dice.random() * 0.08)


@attrs.define(eq=False)
class Person:
    """One of them: a name, sessions of their own, and a connection while it lasts."""

    town: Town
    name: str
    sessions: tuple[str, ...]
    count: int = 0
    mine: list[str] = attrs.field(factory=list[str])
    """The ids of what was sent and acknowledged."""
    wire: Wire | None = None

    async def live(self) -> None:
        """One message after the other, until closing time."""
        try:
            while await self.town.think():
                await self.say()
                if self.town.dice.random() < 0.02:
                    await self.hang_up()
        finally:
            with trio.CancelScope(shield=True):
                await self.hang_up()

    async def say(self) -> None:
        """One message, until it is acknowledged."""
        raise NotImplementedError

    async def hang_up(self) -> None:
        """Close the connection, if there is one."""
        wire, self.wire = self.wire, None
        if wire is not None:
            await wire.aclose()

    def next_message(self, kinds: Mapping[str, int] = KINDS) -> tuple[str, str, str]:
        """A tag, one of the sessions, and a text."""
        self.count += 1
        tag = f"{self.name}-{self.count}"
        (kind,) = self.town.dice.choices(list(kinds), list(kinds.values()))
        return tag, self.town.dice.choice(self.sessions), f"{kind} {tag}"

    async def ask(self, id: str, target: str, fields: Any = None, **more: Any) -> Answer | None:
        """One request about a message. None: nobody answered; it is worth another try."""
        self.town.figures["requests"] += 1
        try:
            if self.wire is None:
                self.wire = await connect(self.town.address, self.token)
            self.town.leaving()
            return await self.wire.ask("POST", target, fields, **more)
        except Gone:
            if self.wire is not None and self.wire.sent and id in self.town.sent:
                self.town.sent[id].unanswered += 1
                self.town.figures["unanswered"] += 1
            await self.hang_up()
            await self.town.wait_a_moment()
            return None

    @property
    def token(self) -> str:
        """With which it comes."""
        return self.town.token


class Poster(Person):
    """Messages. Some wait for the answer; some come again; some ids are used twice."""

    async def say(self) -> None:
        """See `Person.say`."""
        id, session, text = self.next_message()
        sent = self.town.noted(id, session, text)
        # Who waits for a child would wait for the next life.
        waits = self.town.dice.random() < 0.3 and not text.startswith("child")
        while not sent.acknowledged:
            self.take(id, await self.post(id, waits), waits)
        self.mine.append(id)
        if self.town.dice.random() < 0.05:
            again = self.town.dice.choice(self.mine)
            self.take(again, await self.post(again, False), False)
        if self.town.dice.random() < 0.03:
            await self._misuse(self.town.dice.choice(self.mine))

    async def post(self, id: str, waits: bool, **other: str) -> Answer | None:
        """Send a message, once. None: nobody answered."""
        sent = self.town.sent[id]
        headers = {"prefer": "wait=20"} if waits else {}
        fields = {"text": other.get("text", sent.text)}
        if self.town.dice.random() < 0.3:
            headers["idempotency-key"] = id
        else:
            fields["id"] = id
        session = other.get("session", sent.session)
        return await self.ask(id, f"/v1/sessions/{session}/messages", fields, headers=headers)

    def take(self, id: str, answer: Answer | None, waits: bool) -> None:
        """What was answered to a message."""
        if answer is None:
            return
        if answer.status not in ((200, 202) if waits else (202,)):
            self.town.turned_away(id, answer)
            return
        said, sent = answer.json(), self.town.sent[id]
        receipt = said["receipt"]
        if (receipt["id"], receipt["session"]) != (id, f"http:{sent.session}"):
            self.town.complain(f"{id}: a receipt for another message: {said}")
        self.town.acknowledge(id, receipt["status"])
        if "note" in said and not self.town.leaves:
            self.town.complain(f"{id}: {said['note']}, and nobody has stopped it")
        if answer.status == 200:
            self.town.seen["waited for, and answered"] += 1
            sent.replies = [reply["text"] for reply in said["replies"]]
            self.town.settled.add(id)

    async def _misuse(self, id: str) -> None:
        """The id of one message for another: refused, and nothing happens."""
        other = self.town.dice.choice(({"text": f"plain other-{id}"}, {"session": "elsewhere"}))
        answer = await self.post(id, False, **other)
        if answer is None:
            return
        if answer.status == 409 and answer.json()["error"]["type"] == "conflict":
            self.town.seen["an id that was used twice, refused"] += 1
        else:
            self.town.turned_away(f"{id} with {other}", answer)


@attrs.define(eq=False)
class Hook(Person):
    """Webhooks. What was sent once is sent again as it was, in later lives, too."""

    letters: dict[str, tuple[bytes, dict[str, str]]] = attrs.field(
        factory=dict[str, tuple[bytes, dict[str, str]]]
    )

    @property
    def token(self) -> str:
        """None: it signs."""
        return ""

    async def say(self) -> None:
        """See `Person.say`."""
        tag, session, text = self.next_message({"plain": 3, "slow": 1})
        id = f"hook-{tag}"
        sent = self.town.noted(id, session, text)
        self.letters[id] = text.encode(), self._signed(tag, text.encode())
        while not sent.acknowledged:
            await self._post(id)
        self.mine.append(id)
        if self.town.dice.random() < 0.3:
            again = self.town.dice.choice(self.mine)
            if await self._post(again) and self.town.sent[again].life < self.town.life:
                self.town.seen["a webhook of an earlier life, recognised"] += 1

    async def _post(self, id: str) -> bool:
        body, headers = self.letters[id]
        session = self.town.sent[id].session
        answer = await self.ask(id, f"/hooks/{session}", headers=headers, body=body)
        if answer is None:
            return False
        if answer.status != 202:
            self.town.turned_away(id, answer)
            return False
        self.town.acknowledge(id, answer.json()["status"])
        return True

    def _signed(self, tag: str, body: bytes) -> dict[str, str]:
        """By the standard; the formula is written here once more."""
        stamp = str(int(time.time()))
        mac = hmac.new(self.town.secret, f"{tag}.{stamp}.".encode() + body, hashlib.sha256)
        mark = base64.b64encode(mac.digest()).decode()
        return {
            "webhook-id": tag, "webhook-timestamp": stamp, "webhook-signature": f"v1,{mark}",
        }  # fmt: skip
