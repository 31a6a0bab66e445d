"""Who speaks OpenAI's API at the HTTP door while its process is killed, stopped and started again.

chatters    chat completions, under an idempotency key
streamers   responses, going on behind the last event that they have seen
"""

from __future__ import annotations

import hashlib
from contextlib import aclosing
from typing import Any, Final

import attrs

from ._door_people import Person
from ._door_wire import Gone, Refused, Wire, connected

LAST_EVENTS: Final = ("response.completed", "response.failed", "response.incomplete")


class Chatter(Person):
    """Chat completions: the whole answer, or the same question under the same key."""

    async def say(self) -> None:
        """See `Person.say`."""
        tag, session, text = self.next_message({"plain": 3, "says": 1, "slow": 2})
        headers = {"idempotency-key": tag, "x-session": session}
        fields = {"model": "m", "messages": [{"role": "user", "content": text}]}
        id = f"chatcmpl_{key_of('chatcmpl', tag)}"
        self.town.noted(id, session, text)
        while True:
            answer = await self.ask(id, "/v1/chat/completions", fields, headers=headers)
            if answer is not None and answer.status == 200:
                break
            if answer is not None:
                self.town.turned_away(id, answer)
        said = answer.json()
        if said["id"] != id:
            self.town.complain(f"{tag}: another id: {said}")
        sent = self.town.sent[id]
        sent.duplicate += 1  # it does not say whether it knew the question
        self.town.acknowledged += 1
        sent.order = self.town.acknowledged
        sent.replies = [said["choices"][0]["message"]["content"]]
        self.town.settled.add(id)


@attrs.define
class Streamed:
    """One response, as its events told it, over all lives."""

    id: str
    text: str
    events: list[dict[str, Any]] = attrs.field(factory=list[dict[str, Any]])
    pieces: int = 0
    """Streams that it took, of those that told something."""


@attrs.define(eq=False)
class Streamer(Person):
    """Responses, told piece by piece."""

    streams: list[Streamed] = attrs.field(factory=list[Streamed])

    async def say(self) -> None:
        """See `Person.say`."""
        tag, session, text = self.next_message({"writes": 4, "says": 1, "plain": 1})
        told = Streamed(f"resp_{key_of('resp', tag)}", text)
        sent = self.town.noted(told.id, session, text)
        self.streams.append(told)
        while not (told.events and told.events[-1]["type"] in LAST_EVENTS):
            try:
                async with connected(self.town.address, self.town.token) as wire:
                    await self._read(wire, told, tag, session)
            except Gone:
                await self.town.wait_a_moment()
            except Refused as refused:
                self.town.turned_away(told.id, refused.answer)
                await self.town.wait_a_moment()
            if told.events and not sent.acknowledged:
                sent.duplicate += 1
                self.town.acknowledged += 1
                sent.order = self.town.acknowledged
        self.town.settled.add(told.id)

    async def _read(self, wire: Wire, told: Streamed, tag: str, session: str) -> None:
        self.town.figures["requests"] += 1
        if told.events:
            after = told.events[-1]["sequence_number"]
            events = wire.events(f"/v1/responses/{told.id}?stream=true&starting_after={after}")
        else:
            self.town.leaving()
            events = wire.events(
                "/v1/responses",
                method="POST",
                fields={"model": "m", "input": told.text, "stream": True},
                headers={"idempotency-key": tag, "x-session": session},
            )
        stays, before = self.town.dice.random() < 0.8, len(told.events)
        async with aclosing(events):
            async for one in events:
                told.pieces += len(told.events) == before
                if one.data["sequence_number"] != len(told.events):
                    self.town.complain(
                        f"{told.id}: event {one.data['sequence_number']} after"
                        f" {len(told.events)} of them"
                    )
                told.events.append(one.data)
                if not stays and self.town.dice.random() < 0.1:
                    return


def key_of(prefix: str, key: str) -> str:
    """What an idempotency key becomes. It stays so: who comes back may come after an upgrade."""
    return hashlib.sha256(f"{prefix}\0{key}".encode()).hexdigest()[:32]
